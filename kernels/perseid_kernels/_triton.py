"""`triton` and `tl`, or inert stand-ins where Triton is not installed.

`@triton.jit` decorates at import time and `tl.constexpr` is read in signatures, so a kernel's file cannot be
imported without them; yet its float32 oracle lives in the same file and must be usable with torch alone. The
stand-in accepts the decorator and any attribute, and refuses the launch. Nothing on the CPU path imports this.
"""

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError:

        class _StandIn:
            """Answers every attribute with itself; as a decorator it swallows the kernel."""

            def __getattr__(self, name: str) -> "_StandIn":
                return self

            def __call__(self, *_args: Any, **_kwargs: Any) -> "_StandIn":
                return self

            def __getitem__(self, grid: Any) -> NoReturn:
                raise ModuleNotFoundError(
                    "a Triton kernel was launched but triton is not installed: pip install 'perseid[gpu]'"
                )

        triton = tl = _StandIn()

__all__ = ["cdiv", "power_of_two", "tl", "triton"]


def cdiv(value: int, divisor: int) -> int:
    """⌈value / divisor⌉"""
    return -(-value // divisor)


def power_of_two(value: int) -> int:
    """The smallest power of two ≥ value: a Triton tile's sides are powers of two."""
    return 1 << max(value - 1, 0).bit_length()
