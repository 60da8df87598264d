// Number types and scalar functions of the emitted CPU kernels: every function is straight-line code over one number,
// so that the compiler runs it on whole vectors wherever a printed loop calls it.
//
//     bf16, f16      storage; arithmetic is in float
//     exp_(x) …      a few units in the last place, right at ±∞, NaN stays NaN; results below 2.4e-38 are 0

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace {

constexpr float INF = __builtin_inff();
#define INLINE inline __attribute__((always_inline))
// Inner loops in functions of their own have all registers for themselves. Nothing is concluded about them from outside: GCC 12
// takes one whose only stores are masked vectors (AVX2) for one without effects, and drops the calls of it.
#if defined(__clang__)
#define APART __attribute__((noinline))
#else
#define APART __attribute__((noinline, noipa))
#endif

template <class To, class From> INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits in another type");
  To out;
  std::memcpy(&out, &x, sizeof out);
  return out;
}

struct bf16 {
  uint16_t raw;
  bf16() = default;
  // to the nearest, ties to even; a NaN keeps its sign and becomes quiet
  INLINE explicit bf16(float x) {
    const uint32_t u = bits<uint32_t>(x);
    raw = uint16_t(x != x ? (u >> 16 | 0x40) : (u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  INLINE operator float() const { return bits<float>(uint32_t(raw) << 16); }
};

struct f16 {
#ifdef __FLT16_MANT_DIG__
  _Float16 raw;
  f16() = default;
  INLINE explicit f16(float x) : raw(_Float16(x)) {}
  INLINE operator float() const { return float(raw); }
#else
  uint16_t raw;
  f16() = default;
  // 2^112 moves the exponent of one format to that of the other, and makes the hardware round into subnormal numbers
  explicit f16(float x) {
    const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) raw = uint16_t(sign | 0x7e00);
    else if (a >= 0x477ff000) raw = uint16_t(sign | 0x7c00);
    else if (a >= 0x38800000) raw = uint16_t(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
    else raw = uint16_t(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3f000000));
  }
  operator float() const {
    const uint32_t a = uint32_t(raw & 0x7fff) << 13, sign = uint32_t(raw & 0x8000) << 16;
    const float x = a >= 0x0f800000 ? bits<float>(a | 0x7f800000) : bits<float>(a) * 0x1p112f;
    return bits<float>(bits<uint32_t>(x) | sign);
  }
#endif
};

// torch's rule: a NaN on either side is the result. In a reduction a is what was carried: only one comparison waits for it.
template <class N> INLINE N max_(N a, N b) {
  const N larger = b > a ? b : a;
  return b != b ? b : larger;
}
template <class N> INLINE N min_(N a, N b) {
  const N smaller = b < a ? b : a;
  return b != b ? b : smaller;
}

// towards −∞; the remainder has the divisor's sign. Where PyTorch raises, by 0, the result is that of 1
template <class N> INLINE N divisor(N b) { return b + (b == 0); }
template <class N> INLINE N floor_div(N a, N b) {
  b = divisor(b);
  return a / b - ((a % b != 0) & ((a % b < 0) != (b < 0)));
}
template <class N> INLINE N floor_mod(N a, N b) {
  b = divisor(b);
  return a % b + ((a % b != 0) & ((a % b < 0) != (b < 0)) ? b : N(0));
}
// a counter under a key, from 0 to 2³¹ − 1 (patterns/operators.py)
INLINE int32_t draw(uint32_t a, uint32_t b) {
  uint32_t x = (b * 0x9e3779b1u) ^ a;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return int32_t((x ^ (x >> 16)) >> 1);
}
INLINE float floor_div(float a, float b) { return std::floor(a / b); }
INLINE float floor_mod(float a, float b) { return a - b * std::floor(a / b); }

// 2^n for an x that was rounded to n by adding SHIFT: its low bits are n + 126, which is the exponent of 2^(n-1)
constexpr float SHIFT = 12582912.0f + 126.0f;
INLINE float power(float shifted) { return bits<float>(bits<uint32_t>(shifted) << 23); }

// 0 below the smallest result, ∞ above the largest. (Clamping x first, the compiler would split the loop over the cases.)
INLINE float ends(float x, float low, float high, float y) {
  y = x < low ? 0.0f : y;
  return x >= high ? INF : y;
}

INLINE float exp_(float x) {
  const float t = x * 1.44269504f + SHIFT, n = t - SHIFT;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 2.0f / 720;
  p = p * r + 2.0f / 120;
  p = p * r + 2.0f / 24;
  p = p * r + 2.0f / 6;
  p = p * r + 1.0f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return ends(x, -87.6f, 88.72284f, p * power(t));
}

INLINE float exp2_(float x) {
  const float t = x + SHIFT, r = x - (t - SHIFT);
  float p = 2 * 1.5403530e-4f;
  p = p * r + 2 * 1.3333558e-3f;
  p = p * r + 2 * 9.6181291e-3f;
  p = p * r + 2 * 5.5504109e-2f;
  p = p * r + 2 * 2.4022651e-1f;
  p = p * r + 2 * 6.9314718e-1f;
  p = p * r + 2.0f;
  return ends(x, -126.4f, 128.0f, p * power(t));
}

INLINE float log_(float x) {
  // subnormal numbers are brought into range; m in [√½, √2), x = m 2^n
  const bool small = x < 0x1p-126f;
  const uint32_t u = bits<uint32_t>(small ? x * 0x1p23f : x) - 0x3f3504f3;
  const float n = float(int32_t(u) >> 23) - (small ? 23.0f : 0.0f);
  const float r = bits<float>((u & 0x7fffff) + 0x3f3504f3) - 1.0f;
  // log(1 + r) = 2 artanh(s)
  const float s = r / (2.0f + r), s2 = s * s;
  float p = 2.0f / 11;
  p = p * s2 + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  const float y = n * 0.693145752f + (r - s * (r - p * s2) + n * 1.42860677e-6f);
  return x > 0 ? (x < INF ? y : x) : (x == 0 ? -INF : __builtin_nanf(""));
}

INLINE float log1p_(float x) {
  const float u = 1.0f + x;
  const float y = log_(u) + (x - (u - 1.0f)) / u;
  return x < INF ? (u > 0 ? y : log_(u)) : x;
}

INLINE float tanh_(float x) {
  const float a = std::fabs(x), s = x * x;
  // below 0.55 the series, above it the exponential: neither loses digits there
  float p = -929569.0f / 638512875;
  p = p * s + 21844.0f / 6081075;
  p = p * s - 1382.0f / 155925;
  p = p * s + 62.0f / 2835;
  p = p * s - 17.0f / 315;
  p = p * s + 2.0f / 15;
  p = p * s - 1.0f / 3;
  const float large = 1.0f - 2.0f / (1.0f + exp_(2.0f * a));
  return a < 0.55f ? x + x * s * p : std::copysign(large, x);
}

INLINE float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
INLINE float softplus_(float x) { return max_(x, 0.0f) + log1p_(exp_(-std::fabs(x))); }
INLINE float sqrt_(float x) { return std::sqrt(x); }
INLINE float rsqrt_(float x) { return 1.0f / std::sqrt(x); }
INLINE float abs_(float x) { return std::fabs(x); }
INLINE float floor_(float x) { return std::floor(x); }
// rare in scores: the C library's
inline float erf_(float x) { return std::erf(x); }
inline float sin_(float x) { return std::sin(x); }
inline float cos_(float x) { return std::cos(x); }
inline float pow_(float x, float y) { return std::pow(x, y); }
inline float log2_(float x) { return std::log2(x); }

// ---- whole rows

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t Lane __attribute__((vector_size(LANES * sizeof(float)), may_alias));

// Half of an exchange between rows that are S apart: lanes with bit S cross over.
template <int S, bool SECOND, int... I> INLINE Vector exchange(Vector a, Vector b, std::integer_sequence<int, I...>) {
  // lanes of b are numbered from LANES on
#ifdef __clang__
  return __builtin_shufflevector(a, b, (SECOND ? ((I & S) ? I + LANES : I + S) : ((I & S) ? I - S + LANES : I))...);
#else
  return __builtin_shuffle(a, b, Lane{(SECOND ? ((I & S) ? I + LANES : I + S) : ((I & S) ? I - S + LANES : I))...});
#endif
}

// max_ for vectors
INLINE Vector larger(Vector a, Vector b) {
  const Vector x = b > a ? b : a;
  return b != b ? b : x;
}

// One number from all lanes: in each round halves that are S apart meet.
template <int S = LANES / 2, class Meet> INLINE float fold(Vector x, Meet meet) {
  if constexpr (S == 0) return x[0];
  else {
    return fold<S / 2>(meet(x, exchange<S, true>(x, x, std::make_integer_sequence<int, LANES>())), meet);
  }
}

// Reduces x[0 … n-1], aligned to vectors, in two chains; `first` takes part once and is the value of no numbers.
template <class Meet, class One> INLINE float reduce(const float* x, int n, float first, float neutral, Meet meet, One one) {
  Vector a = Vector{} + neutral, b = a;
  int i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    a = meet(a, *(const Vector*)(x + i));
    b = meet(b, *(const Vector*)(x + i + LANES));
  }
  for (; i + LANES <= n; i += LANES) a = meet(a, *(const Vector*)(x + i));
  for (; i < n; i++) first = one(first, x[i]);
  return one(first, fold(meet(a, b), meet));
}

INLINE float row_sum(const float* x, int n) {
  return reduce(x, n, 0.0f, 0.0f, [](Vector a, Vector b) { return a + b; }, [](float a, float b) { return a + b; });
}
INLINE float row_max(const float* x, int n, float first) { return reduce(x, n, first, -INF, larger, max_<float>); }

}  // namespace
