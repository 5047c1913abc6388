"""What differs from one kind of engine to another, behind one contract: `of(model)` is the way in.

`base` is the contract, `table` knows the kinds, and nobody else imports them: `vllm` with `vllm_inside` (vLLM's
endpoints, and what runs inside it), `generic` (what the configuration names), `unstated` (neither is said: it is asked
what it has).
"""

from proxy.engine.kinds.table import extension, of, upgraded

__all__ = ["extension", "of", "upgraded"]
