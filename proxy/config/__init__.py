"""The configuration: a section a file, `settings` of all of them, and what loads, explains and compares them.

Knows the tiers, for idle timetables. May not import anything that acts on a setting.
"""
