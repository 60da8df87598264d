"""Scalar functions that Triton has no portable form of: device functions that printed terms call, one law each.

The polynomials are least-squares fits at Chebyshev points; the error stated is the largest over the branch's interval,
in units of 2⁻²⁴ of the result. None of them needs a vendor's library, so they run in the interpreter as well.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def floor_div(a, b):
    """a // b rounded towards −∞, whatever the machine's own division does."""
    q = a // b
    r = a - q * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)


@triton.jit
def floor_mod(a, b):
    """a − b·⌊a/b⌋: the remainder has the sign of b."""
    r = a - (a // b) * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def draw(a, b):
    """From 0 to 2³¹ − 1: a counter under a key (`draw` in patterns/operators.py)."""
    x = (b.to(tl.uint32) * 0x9E3779B1) ^ a.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return ((x ^ (x >> 16)) >> 1).to(tl.int32)


@triton.jit
def truncate(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2 * tl.floor(low * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1))
    return tl.where(up, low + 1, low)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0))


@triton.jit
def tanh(x):
    """Odd polynomial below 0.625 (error 1.3), 1 − 2/(exp(2|x|) + 1) above (error 2.7)."""
    a = tl.abs(x)
    z = x * x
    p = -8.34698049e-3 + z * 2.29584126e-3
    p = 0.133333043 + z * (-5.39594059e-2 + z * (2.17699609e-2 + z * p))
    small = x + x * (z * (-0.333333332 + z * p))
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def expm1(x):
    """Polynomial below 0.5 in magnitude (error 1.4), exp(x) − 1 beyond."""
    p = 8.33318204e-3 + x * (1.38886728e-3 + x * (1.99621861e-4 + x * 2.49397416e-5))
    p = 0.5 + x * (0.166666671 + x * (4.16666677e-2 + x * p))
    return tl.where(tl.abs(x) < 0.5, x + x * x * p, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """2·atanh(x / (2 + x)) by its odd polynomial for −0.5 < x < 1 (error 2.8), log(1 + x) beyond."""
    near = (x > -0.5) & (x < 1.0)
    y = tl.where(near, x, 0.0)
    s = y / (2.0 + y)
    z = s * s
    p = 0.285925834 + z * (0.21703315 + z * 0.232390506)
    p = 0.666666673 + z * (0.399997014 + z * p)
    return tl.where(near, 2.0 * s + s * (z * p), tl.log(1.0 + x))


@triton.jit
def asinh(x):
    """log(|x| + √(x² + 1)) with the sign of x: log1p below 10⁴ (error 3.1), log(2·|x|) above, where √(x² + 1) is |x|."""
    a = tl.abs(x)
    near = a < 1e4
    s = tl.where(near, a, 0.0)
    small = log1p(s + s * (s / (1.0 + tl.sqrt(s * s + 1.0))))
    large = tl.log(tl.where(near, 1.0, a)) + 0.693147181
    y = tl.where(near, small, large)
    return tl.where(x < 0, -y, y)


@triton.jit
def atan(x):
    """Odd polynomial below tan(π/8) (error 1.4), π/4 + atan((x − 1)/(x + 1)) to tan(3π/8) (3.5), π/2 − atan(1/x) (2)."""
    a = tl.abs(x)
    far, mid = a > 2.41421356, a > 0.414213562
    t = tl.where(far, -1.0 / tl.where(far, a, 1.0), tl.where(mid, (a - 1.0) / (tl.where(far, 0.0, a) + 1.0), a))
    z = t * t
    p = -0.138776856 + z * 8.05374450e-2
    p = t + t * (z * (-0.333329492 + z * (0.199777106 + z * p)))
    y = tl.where(far, 1.57079633, tl.where(mid, 0.785398163, 0.0)) + p
    return tl.where(x < 0, -y, y)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x itself above 20, as torch has it."""
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x))))


@triton.jit
def power(x, y):
    """x**y for floats; a negative base needs an integral exponent."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = (y - 2.0 * tl.floor(y * 0.5)) == 1.0
    value = tl.where((x < 0) & odd, -size, tl.where((x < 0) & (whole == 0), float("nan"), size))
    return tl.where(y == 0.0, 1.0, value)


@triton.jit
def remainder(a, b):
    """a − b·⌊a/b⌋ for floats."""
    return a - b * tl.floor(a / b)
