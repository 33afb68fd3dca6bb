"""Settings that belong together, by one name: `fusechat`, what wins in our measurements, and `paper`, FuseChat's own.

A single option that is given wins over the preset. `examples/results` has the measurements.
"""

from typing import Any

from fusechat_fuse.errors import InputError

LOSS_KINDS = ("ce", "kl")
PRESETS = {
    "fusechat": {
        "mapping": "prefix",
        "function": "avg_ce_slice",
        "combination": "min_ce_slice",
        "fallback": "label",
        "ce_unit": "byte",
        "tail": "label",
        "lm_loss_weight": 0.5,
    },
    "paper": {
        "mapping": "statistics",
        "function": "min_ce",
        "combination": "min_ce",
        "fallback": "pivot",
        "ce_unit": "token",
        "tail": "drop",
        "lm_loss_weight": 0.9,
    },
}


def or_preset(preset: str, **options) -> dict[str, Any]:
    """The options, with the preset's value where one is None.

    Raises: InputError for an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"value for preset: expected {' or '.join(PRESETS)}, got {preset!r}. Use one of them.")
    return {name: PRESETS[preset][name] if value is None else value for name, value in options.items()}
