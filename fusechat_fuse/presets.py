"""The one source of defaults of fusion, mapping and combination: option values that belong together under one name.

`fusechat` (the default) does best in our measurements (`examples/results`); `paper` is FuseChat's own. An option that
is given explicitly overrides the preset.
"""

from typing import Any

from fusechat_fuse.errors import InputError

LOSS_KINDS = ("ce", "kl")
PRESETS = {
    "fusechat": {
        "mapping": "prefix",
        "fusion_function": "avg_ce_slice",
        "combination": "min_ce_slice",
        "fusion_fallback": "label",
        "ce_unit": "byte",
        "fusion_tail": "label",
        "lm_loss_weight": 0.5,
    },
    "paper": {
        "mapping": "statistics",
        "fusion_function": "min_ce",
        "combination": "min_ce",
        "fusion_fallback": "pivot",
        "ce_unit": "token",
        "fusion_tail": "drop",
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
