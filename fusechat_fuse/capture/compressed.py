"""DistillKit's compressed log-probabilities, decoded.

`compressed_logprobs` holds, for each token, in this order and little-endian: the `exact_k` largest log-probabilities in
`exact_dtype`; one coefficient for each of `polynomial_terms` in `term_dtype`; for each of `residual_bins` a scale in
`scale_dtype` and `num_elements` numbers of `element_bits` bits, filled up to whole bytes. With t = 0, 1, ... (or
linspace(0, 1, k - exact_k) where `normalize_t`), term i being t^i, sqrt(t) or exp(t):
```
tail_t = sum_i coefficient_i term_i(t) + residual_t         residual_t = scale (number - 2^(bits - 1)); one bit: +-scale
logp   = exact values, then the tail; their cumulative sum where `delta_encoding`
```
`bytepacked_indices` holds the k token ids of `ceil(log2(d))` bits each. Bits are packed from the most significant on.
The older format has columns of numbers: `exact_values` and `coeffs` of the powers 0 to `polynomial_degree` (negative
ones where `invert_polynomial`) of t = 1, 2, ..., then perhaps sqrt(t); `packed_indices` holds ids in 64-bit integers,
as many as fit into each, from the least significant bits on.

Source: arcee-ai/DistillKit, README ("Logit Compression") and `distillkit/compression`; written from its rules.
Differs: the tail is not rounded to the type of the exact values.

Shape letters: P positions, k entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusechat_fuse.errors import InputError, first_line
from fusechat_fuse.store.files import read_yaml

CONFIGURATION = "compression_config.yaml"
_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_LEGACY = {"vocab_size", "k", "exact_k", "polynomial_degree"}


@dataclass(frozen=True)
class Compression:
    """How a capture was compressed; the fields are those of its configuration.

    residual_bins: (scale_dtype, element_bits, num_elements) each. legacy: the older format.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    residual_bins: tuple[tuple[str, int, int], ...] = ()
    delta_encoding: bool = True
    normalize_t: bool = False
    legacy: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a capture: of the log-probabilities, then of the ids."""
        if self.legacy:
            return ("exact_values", "coeffs", "packed_indices")
        return ("compressed_logprobs", "bytepacked_indices")

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return max(math.ceil(math.log2(self.d)), 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """The entries of each of `columns` for one token."""
        if self.legacy:
            return (self.exact_k, len(self.polynomial_terms), -(-self.k // (64 // self.id_bits)))
        size = self.exact_k * _SIZES[self.exact_dtype] + len(self.polynomial_terms) * _SIZES[self.term_dtype]
        size += sum(_SIZES[dtype] + -(-bits * count // 8) for dtype, bits, count in self.residual_bins)
        return (size, -(-self.k * self.id_bits // 8))

    def decode(self, *columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [P, k], log-probabilities float64 [P, k]) of the columns' entries, each [P, its width]."""
        if self.legacy:
            exact, coefficients, packed = columns
            t = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
            tail = coefficients.astype(np.float64) @ self._terms(t).T
            per_number = 64 // self.id_bits
            shifts = np.arange(per_number, dtype=np.uint64) * np.uint64(self.id_bits)
            ids = packed.astype(np.uint64)[:, :, None] >> shifts & np.uint64((1 << self.id_bits) - 1)
            return ids.reshape(len(ids), -1)[:, : self.k].astype(np.int64), np.hstack([exact, tail])
        logprobs, packed = columns
        return _unpack(packed, self.id_bits, self.k), self._values(np.ascontiguousarray(logprobs))

    def _values(self, raw: np.ndarray) -> np.ndarray:
        count, at = self.k - self.exact_k, self.exact_k * _SIZES[self.exact_dtype]
        exact, tail = _floats(raw[:, :at], self.exact_dtype), np.zeros((len(raw), count))
        if self.polynomial_terms:
            end = at + len(self.polynomial_terms) * _SIZES[self.term_dtype]
            t = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
            tail += _floats(raw[:, at:end], self.term_dtype) @ self._terms(t).T
            at = end
        first = 0
        for dtype, bits, elements in self.residual_bins:
            scale, at = _floats(raw[:, at : at + _SIZES[dtype]], dtype), at + _SIZES[dtype]
            end = at + -(-bits * elements // 8)
            numbers, at = _unpack(raw[:, at:end], bits, elements), end
            tail[:, first : first + elements] += scale * (2 * numbers - 1 if bits == 1 else numbers - (1 << bits - 1))
            first += elements
        values = np.hstack([exact, tail])
        return np.cumsum(values, 1) if self.delta_encoding else values

    def _terms(self, t: np.ndarray) -> np.ndarray:
        """The terms' values at t, [len(t), terms]."""
        special = {"sqrt": np.sqrt, "exp": np.exp}
        terms = [special[i](t) if isinstance(i, str) else t ** float(i) for i in self.polynomial_terms]
        return np.stack(terms, 1) if terms else np.zeros((len(t), 0))


def read_compression(path: Path) -> Compression:
    """The configuration beside a capture. Raises: InputError where it is none."""
    got = "none"
    if path.exists():
        found = read_yaml(path, "compression")
        try:
            found = found.get("teacher", found)
            found = found.get("logprob_compressor") or found.get("legacy_logit_compression") or found
            return _legacy(found) if set(found) >= _LEGACY else _current(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            got = f"another ({type(error).__name__}: {first_line(error)})"
    raise InputError(
        f"compression for {path.parent}: expected DistillKit's {CONFIGURATION}, with d, k and exact_k, got {got}. "
        "Write the logprob_compressor of the data's documentation there."
    )


def _current(found: dict[str, Any]) -> Compression:
    bins = [(one["scale_dtype"], int(one["element_bits"]), int(one["num_elements"])) for one in found["residual_bins"]]
    terms = tuple(found.get("polynomial_terms") or ())
    made = Compression(
        *(int(found[name]) for name in ("d", "k", "exact_k")),
        exact_dtype=found.get("exact_dtype", "float32"),
        polynomial_terms=terms,
        term_dtype=found.get("term_dtype", "float32"),
        residual_bins=tuple(bins),
        delta_encoding=bool(found.get("delta_encoding", True)),
        normalize_t=bool(found.get("normalize_t", False)),
    )
    dtypes = (made.exact_dtype, made.term_dtype, *(dtype for dtype, _, _ in bins))
    unknown = [name for name in dtypes if name not in _SIZES]
    unknown += [str(i) for i in terms if not isinstance(i, int) and i not in ("sqrt", "exp")]
    if unknown:
        raise ValueError(f"unknown type or term {', '.join(unknown)}")
    if not 0 <= made.exact_k <= made.k or sum(count for *_, count in bins) > made.k - made.exact_k:
        raise ValueError(f"k {made.k}, exact_k {made.exact_k} and the bins do not go together")
    return made


def _legacy(found: dict[str, Any]) -> Compression:
    sign = -1 if found.get("invert_polynomial", True) else 1
    terms: tuple[int | str, ...] = tuple(sign * i for i in range(int(found["polynomial_degree"]) + 1))
    terms += ("sqrt",) if found.get("with_sqrt_term") else ()
    k, exact_k = int(found["k"]), int(found["exact_k"])
    terms = terms if exact_k < k else ()
    return Compression(int(found["vocab_size"]), k, exact_k, polynomial_terms=terms, delta_encoding=False, legacy=True)


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes [P, n size] as float64 [P, n]."""
    raw = np.ascontiguousarray(raw, np.uint8)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    return raw.view(f"<f{_SIZES[dtype]}").astype(np.float64)


def _unpack(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Bytes [P, n] as int64 [P, count], of `bits` each, the most significant first."""
    found = np.unpackbits(np.ascontiguousarray(raw, np.uint8), axis=1)[:, : count * bits]
    return found.reshape(len(raw), count, bits) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
