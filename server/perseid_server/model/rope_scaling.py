"""Rotary position embedding: the angular frequency of each pair of head dimensions, with context scaling.

    angle[t, j] = position[t] · inv_freq[j],  j < D/2;    cos and sin are multiplied by `attention_scaling`

Computed in float32 in the order transformers' `ROPE_INIT_FUNCTIONS` uses: the two differ by the last bit of a
few frequencies at most, so that a model sees the angles it was trained with. Sources: linear, kaiokendev; llama3,
the Llama 3.1 release; YaRN, arXiv:2309.00071. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perseid_server.errors import UnsupportedModel
from perseid_server.model.config_fields import flag, positive_int, positive_number, section

Floats = NDArray[np.float32]
RopeType = Literal["default", "linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies follow from `theta`. Fields after `factor` are read by the types named beside them."""

    theta: float
    type: RopeType = "default"
    factor: float = 1.0  # every type but "default" and "factors"
    original_max_position_embeddings: int = 0  # llama3, yarn: positions the model was trained with
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is kept
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is divided by `factor`
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions
    attention_scaling: float = 1.0  # yarn: multiplies cos and sin
    frequency_factors: tuple[float, ...] = ()  # factors: divides frequency j (GGUF's rope_freqs.weight)

    @staticmethod
    def yarn_temperature(factor: float, weight: float = 1.0) -> float:
        """What YaRN multiplies cos and sin with when the model does not say: 0.1·weight·ln(factor) + 1."""
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def inv_freq(self, head_dim: int) -> Floats:
        """Radians per position, float32 [head_dim / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # NumPy's float32 power is up to 2 ULP off where the CPU has AVX-512: float64, rounded, is the same everywhere.
        powers = np.power(self.theta, exponents.astype(np.float64))
        wavelengths: Floats = powers.astype(np.float32)  # over 2π
        base: Floats = np.float32(1) / wavelengths
        match self.type:
            case "default":
                return base
            case "linear":
                divisors = np.asarray(self.factor, dtype=np.float32)
            case "llama3":
                return self._llama3(base)
            case "yarn":
                return self._yarn(wavelengths, head_dim)
            case "factors":
                divisors = np.asarray(self.frequency_factors, dtype=np.float32)
        scaled: Floats = base / divisors
        return scaled

    def _llama3(self, base: Floats) -> Floats:
        """Keep short wavelengths, divide long ones by `factor`, blend between."""
        trained = self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = np.float32(2 * math.pi) / base
        kept = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
        blended: Floats = (1 - kept) * base / np.float32(self.factor) + kept * base
        scaled: Floats = np.where(wavelength > trained / low, base / np.float32(self.factor), blended)
        return np.where(wavelength < trained / high, base, scaled)

    def _yarn(self, wavelengths: Floats, head_dim: int) -> Floats:
        """Blend kept and divided frequencies with a linear ramp over the dimensions."""

        def dimension_of(rotations: float) -> float:
            trained = self.original_max_position_embeddings
            return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step, without dividing by zero
        dimensions = np.arange(head_dim // 2, dtype=np.float32)
        kept = 1 - np.clip((dimensions - np.float32(low)) / np.float32(high - low), 0, 1)
        divided = np.float32(1) / (np.float32(self.factor) * wavelengths)
        blended: Floats = divided * (1 - kept) + np.float32(1) / wavelengths * kept
        return blended


_KNOWN_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
"""What each type of `rope_scaling` reads; another key is refused, for it would change the model unnoticed."""

_SCALING = "rope_scaling"
_ALWAYS_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def rope_from_hf(config: Mapping[str, Any], max_position_embeddings: int, default_theta: float) -> RopeScaling:
    """The scaling that a Hugging Face config asks for, in its old form (`rope_theta`, `rope_scaling`) or new
    (`rope_parameters`). UnsupportedModel names a type or key that is not known."""
    given = {**section(config, "rope_parameters"), **section(config, "rope_scaling")}
    kind = given.get("rope_type", given.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _KNOWN_KEYS:
        raise UnsupportedModel(
            f"rope_scaling: type {kind!r} is not supported; supported: {', '.join(_KNOWN_KEYS)}",
            field="rope_scaling",
        )
    unknown = given.keys() - _KNOWN_KEYS[kind] - _ALWAYS_KNOWN
    if unknown:
        raise UnsupportedModel(f"rope_scaling: unknown key {min(unknown)!r} for type {kind!r}", field="rope_scaling")
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UnsupportedModel(
            f"partial_rotary_factor: {partial} is not supported; heads must be rotated whole",
            field="partial_rotary_factor",
        )
    theta = positive_number(given, "rope_theta", positive_number(config, "rope_theta", default_theta))
    if theta <= 1:
        raise UnsupportedModel(f"rope_theta: expected a number above 1, got {theta}", field="rope_theta")
    return _of_type(kind, theta, given, max_position_embeddings)


def _of_type(kind: str, theta: float, given: Mapping[str, Any], max_position_embeddings: int) -> RopeScaling:
    # Dynamic scaling starts beyond max_position_embeddings, where Perseid never goes.
    if kind in {"default", "dynamic"}:
        return RopeScaling(theta)
    factor = positive_number(given, "factor", within=_SCALING)
    if kind == "linear":
        return RopeScaling(theta, "linear", factor)
    trained = positive_int(given, "original_max_position_embeddings", max_position_embeddings, _SCALING)
    if kind == "llama3":
        low, high = (positive_number(given, f"{end}_freq_factor", within=_SCALING) for end in ("low", "high"))
        if low >= high:
            raise UnsupportedModel(
                f"rope_scaling.high_freq_factor: expected more than low_freq_factor ({low}), got {high}", field=_SCALING
            )
        return RopeScaling(theta, "llama3", factor, trained, low_freq_factor=low, high_freq_factor=high)
    return RopeScaling(
        theta,
        "yarn",
        factor,
        trained,
        beta_fast=positive_number(given, "beta_fast", 32, _SCALING),
        beta_slow=positive_number(given, "beta_slow", 1, _SCALING),
        truncate=flag(given, "truncate", True, _SCALING),
        attention_scaling=_yarn_attention_scaling(factor, given),
    )


def _yarn_attention_scaling(factor: float, given: Mapping[str, Any]) -> float:
    """What the config states, or DeepSeek's ratio of two temperatures, or YaRN's own."""
    if given.get("attention_factor") is not None:
        return positive_number(given, "attention_factor", within=_SCALING)
    temperature = RopeScaling.yarn_temperature
    if given.get("mscale") and given.get("mscale_all_dim"):
        over, under = (positive_number(given, key, within=_SCALING) for key in ("mscale", "mscale_all_dim"))
        return temperature(factor, over) / temperature(factor, under)
    return temperature(factor)
