"""The configuration: settings and their validation, their reference, what differs between two of them.

Knows the tiers, for idle timetables. May not import anything that acts on a setting.
"""
