// The two products of a tile, S = Q Kᵀ and acc = c·acc + W V, and the layouts that they read; for `fused.hpp`.
//
//     Left    rows [TILE_P, depth]: queries or weights          Right   panels over columns: keys or values
//
//     Tiles   bf16 on the matrix unit (AMX): 16 × 16 results from 32 products each; Right in pairs along the depth
//     Fma     floats on vectors of any width; Right as [columns / BLOCK][depth][BLOCK]. f16 and bf16 are widened as packed
//
// Rows, columns and depth past the end are packed as zeros: memory past the end is never read.

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#endif
#include <algorithm>
#include <type_traits>
#include <unistd.h>
#include <utility>

namespace {

static_assert(TILE_P % 16 == 0 && TILE_M % 32 == 0, "tiles of 16 queries and 32 keys, or multiples");

constexpr int BLOCK_ROWS = LANES == 16 ? 8 : 4, BLOCK = 2 * LANES;

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Key tiles that a run may have: its scores of all products lie in the L1 cache. Rows of scores and weights are LD numbers
// apart, which is not a power of two: rows do not share their places in the cache.
constexpr int SCORES_BYTES = 36 << 10;
constexpr int RUN_TILES = std::max<int>(1, SCORES_BYTES / int(sizeof(float)) / (PRODUCTS * TILE_P * TILE_M));
constexpr int LD = RUN_TILES * TILE_M + 32;

// LANES numbers from memory, zeros after the first `count`.
template <class N> INLINE Vector load(const N* from, int count) {
  Vector out;
  alignas(64) float row[LANES];
  if (std::is_same_v<N, float> && count >= LANES) {
    std::memcpy(&out, from, sizeof out);
    return out;
  }
  if (count >= LANES)
    for (int i = 0; i < LANES; i++) row[i] = float(from[i]);
  else
    for (int i = 0; i < LANES; i++) row[i] = i < count ? float(from[i]) : 0.0f;
  return *(const Vector*)row;
}

// x[i][j] -> x[j][i]
template <int S = 1> INLINE void transpose(Vector (&x)[LANES]) {
  if constexpr (S < LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & S) continue;
      const Vector a = x[i], b = x[i + S];
      x[i] = exchange<S, false>(a, b, std::make_integer_sequence<int, LANES>());
      x[i + S] = exchange<S, true>(a, b, std::make_integer_sequence<int, LANES>());
    }
    transpose<2 * S>(x);
  }
}

// x[rows, LANES] = what `row(i)` gives, its transposition stored with `stride` floats between rows
template <class Row> INLINE void store_transposed(float* to, int stride, Row row) {
  Vector x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) x[i] = row(i);
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) *(Vector*)(to + i * stride) = x[i];
}

struct Fma {
  using Left = float;
  using Right = float;
  static constexpr int ROWS = BLOCK_ROWS;
  static constexpr int deep(int k) { return int(up(k, LANES)); }
  static constexpr int wide(int n) { return int(up(n, BLOCK)); }
  static bool ready() { return true; }
  static void start() {}
  static void stop() {}

  // Queries [rows, E].
  template <int E> static APART void pack_left(float* to, const T* from, int64_t stride, int rows) {
    for (int i = 0; i < TILE_P; i++)
      for (int e = 0; e < deep(E); e += LANES)
        *(Vector*)(to + i * deep(E) + e) = i < rows ? load(from + i * stride + e, E - e) : Vector{};
  }

  // Keys [rows, E] as panels [n / BLOCK][e][BLOCK].
  template <int E> static APART void pack_keys(float* to, const T* from, int64_t stride, int rows) {
    for (int n = 0; n < TILE_M; n += LANES) {
      float* panel = to + n / BLOCK * BLOCK * deep(E) + n % BLOCK;
      for (int e = 0; e < deep(E); e += LANES)
        store_transposed(panel + e * BLOCK, BLOCK, [&](int i) {
          return n + i < rows ? load(from + (n + i) * stride + e, E - e) : Vector{};
        });
    }
  }

  // Values [rows, F] as panels [f / BLOCK][n][BLOCK].
  static APART void pack_values(float* to, const T* from, int64_t stride, int rows) {
    for (int f = 0; f < wide(F); f += BLOCK)
      for (int n = 0; n < TILE_M; n++, to += BLOCK)
        for (int j = 0; j < BLOCK; j += LANES)
          *(Vector*)(to + j) = n < rows ? load(from + n * stride + f + j, F - f - j) : Vector{};
  }

  // What a block does with its result's earlier value.
  enum Before { NONE, ADDED, SCALED };

  // out = A B, out + A B or c out + A B for one block. A: rows of `lda`, DEPTH numbers for each of `tiles`; B: a panel of
  // each tile, `next` numbers apart; c: a factor for each row.
  template <Before B, int DEPTH>
  static INLINE void block(const float* a, int lda, const float* b, int tiles, int64_t next, const float* c, float* out,
                           int ldo) {
    // what is small beside the earlier value is summed up before it meets it
    Vector s[BLOCK_ROWS][2] = {};
    for (int t = 0; t < tiles; t++, a += DEPTH, b += next - DEPTH * BLOCK)
#pragma GCC unroll 4
      for (int k = 0; k < DEPTH; k++, b += BLOCK) {
        const Vector b0 = *(const Vector*)b, b1 = *(const Vector*)(b + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK_ROWS; i++) {
          s[i][0] += a[i * lda + k] * b0;
          s[i][1] += a[i * lda + k] * b1;
        }
      }
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_ROWS; i++)
      for (int j = 0; j < 2; j++) {
        Vector& to = *(Vector*)(out + i * ldo + j * LANES);
        to = B == NONE ? s[i][j] : s[i][j] + (B == SCALED ? to * c[i] : to);
      }
  }

  // S = Q Kᵀ of one tile
  template <int E> static APART void scores(const float* q, const float* k, float* s, int rows) {
    constexpr int D = deep(E);
    for (int j = 0; j < TILE_M; j += BLOCK)
      for (int i = 0; i < rows; i += BLOCK_ROWS)
        block<NONE, D>(q + i * D, D, k + j * D, 1, 0, nullptr, s + i * LD + j, LD);
  }
  // Factors are applied by the product.
  static INLINE void scale(float*, float) {}
  // Weights are read where `step` wrote them.
  static INLINE void narrow(float*, int) {}
  // acc = c·acc + W V over the tiles of a run; `next`: from one tile's values to the next one's. A panel of values over
  // some tiles stays in the L1 cache while all rows use it.
  static void accumulate(const float* w, const float* v, int tiles, int64_t next, const float* c, float* acc, int rows) {
    constexpr int TILES = std::max<int>(1, (16 << 10) / int(sizeof(float)) / (TILE_M * BLOCK));
    part<true>(w, v, std::min(tiles, TILES), next, c, acc, rows);
    for (int t = TILES; t < tiles; t += TILES)
      part<false>(w + t * TILE_M, v + t * next, std::min(tiles - t, TILES), next, c, acc, rows);
  }
  template <bool FIRST>
  static APART void part(const float* w, const float* v, int tiles, int64_t next, const float* c, float* acc, int rows) {
    for (int j = 0; j < wide(F); j += BLOCK)
      for (int i = 0; i < rows; i += BLOCK_ROWS)
        block<FIRST ? SCALED : ADDED, TILE_M>(w + i * LD, LD, v + j * TILE_M, tiles, next, c + i, acc + i * wide(F) + j,
                                              wide(F));
  }
};

#ifdef __AMX_BF16__
struct Tiles {
  using Left = bf16;
  using Right = bf16;
  static constexpr int ROWS = 16;
  static constexpr int deep(int k) { return int(up(k, 32)); }
  static constexpr int wide(int n) { return int(up(n, 16)); }

  // Once in a process: ask the kernel for the tile registers, ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
  static bool ready() {
    static const bool granted = !syscall(SYS_arch_prctl, 0x1023, 18);
    return granted;
  }
  // Eight tiles of 16 rows of 64 bytes.
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static void start() {
    static const Config config;
    settle();
    _tile_loadconfig(&config);
  }
  // The compiler is not told that tiles are read from memory: what was written before has to be there.
  static INLINE void settle() { __asm__ volatile("" ::: "memory"); }
  static void stop() { _tile_release(); }

  // 32 numbers from memory, zeros after the first `count`.
  static INLINE Vector load(const bf16* from, int count) {
    Vector out{};
    if (count >= 32) std::memcpy(&out, from, 64);
    else if (count > 0) std::memcpy(&out, from, count * sizeof(bf16));
    return out;
  }

  // Queries [rows, E].
  template <int E> static APART void pack_left(bf16* to, const bf16* from, int64_t stride, int rows) {
    for (int i = 0; i < TILE_P; i++)
      for (int e = 0; e < deep(E); e += 32)
        *(Vector*)(void*)(to + i * deep(E) + e) = i < rows ? load(from + i * stride + e, E - e) : Vector{};
  }

  // Keys [rows, E] as tiles [n / 16][e / 32] of [e pairs][n]: pairs move as one number.
  template <int E> static APART void pack_keys(bf16* to, const bf16* from, int64_t stride, int rows) {
    for (int n = 0; n < TILE_M; n += 16)
      for (int e = 0; e < deep(E); e += 32, to += 512)
        store_transposed((float*)(void*)to, 16, [&](int i) {
          return n + i < rows ? load(from + (n + i) * stride + e, E - e) : Vector{};
        });
  }

  // Values [rows, F] as tiles [f / 16][n / 32] of [n pairs][f].
  static APART void pack_values(bf16* to, const bf16* from, int64_t stride, int rows) {
    for (int f = 0; f < wide(F); f += 16)
      for (int n = 0; n < TILE_M; n += 2, to += 32) {
        uint16_t x[2][16] = {};
        const bf16* at = from + n * stride + f;
        if (F - f >= 16 && n + 2 <= rows) {
          pair((const uint16_t*)(const void*)at, (const uint16_t*)(const void*)(at + stride), to);
          continue;
        }
        for (int i = 0; i < std::min(2, rows - n); i++)
          std::memcpy(x[i], at + i * stride, std::min(16, F - f) * sizeof(bf16));
        pair(x[0], x[1], to);
      }
  }
  static INLINE void pair(const uint16_t* a, const uint16_t* b, bf16* to) {
    uint32_t pairs[16];
    for (int i = 0; i < 16; i++) pairs[i] = a[i] | uint32_t(b[i]) << 16;
    std::memcpy((void*)to, pairs, sizeof pairs);
  }

  // out[16 R, 16 C] = (out) + A B. A: rows of `lda`, DEPTH numbers for each of `tiles`; B: [column / 16][depth / 32] of each
  // tile, `next` numbers apart.
  template <bool ADD, int DEPTH, int R, int C>
  static INLINE void block(const bf16* a, int lda, const bf16* b, int tiles, int64_t next, float* out, int ldo) {
    const int64_t row = ldo * sizeof(float);
    float* const low = out + 16 * ldo;
    if constexpr (ADD) {
      _tile_loadd(0, out, row);
      if constexpr (C > 1) _tile_loadd(1, out + 16, row);
      if constexpr (R > 1) _tile_loadd(2, low, row);
      if constexpr (R > 1 && C > 1) _tile_loadd(3, low + 16, row);
    } else {
      _tile_zero(0);
      if constexpr (C > 1) _tile_zero(1);
      if constexpr (R > 1) _tile_zero(2);
      if constexpr (R > 1 && C > 1) _tile_zero(3);
    }
    for (int t = 0; t < tiles; t++, a += DEPTH, b += next)
#pragma GCC unroll 4
      for (int k = 0; k < DEPTH; k += 32) {
        _tile_loadd(4, a + k, lda * sizeof(bf16));
        _tile_loadd(6, b + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (C > 1) {
          _tile_loadd(7, b + (DEPTH + k) * 16, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (R > 1) {
          _tile_loadd(5, a + 16 * lda + k, lda * sizeof(bf16));
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (C > 1) _tile_dpbf16ps(3, 5, 7);
        }
      }
    _tile_stored(0, out, row);
    if constexpr (C > 1) _tile_stored(1, out + 16, row);
    if constexpr (R > 1) _tile_stored(2, low, row);
    if constexpr (R > 1 && C > 1) _tile_stored(3, low + 16, row);
  }

  template <bool ADD, int DEPTH, int COLUMNS, int R>
  static INLINE void columns(const bf16* a, int lda, const bf16* b, int tiles, int64_t next, float* out, int ldo) {
    settle();
    int j = 0;
    for (; j + 32 <= COLUMNS; j += 32) block<ADD, DEPTH, R, 2>(a, lda, b + j * DEPTH, tiles, next, out + j, ldo);
    if constexpr (COLUMNS % 32 != 0) block<ADD, DEPTH, R, 1>(a, lda, b + j * DEPTH, tiles, next, out + j, ldo);
  }

  template <bool ADD, int DEPTH, int COLUMNS>
  static INLINE void multiply(const bf16* a, int lda, const bf16* b, int tiles, int64_t next, float* out, int ldo,
                              int rows) {
    int i = 0;
    for (; i + 32 <= rows; i += 32)
      columns<ADD, DEPTH, COLUMNS, 2>(a + i * lda, lda, b, tiles, next, out + i * ldo, ldo);
    if (i < rows) columns<ADD, DEPTH, COLUMNS, 1>(a + i * lda, lda, b, tiles, next, out + i * ldo, ldo);
  }

  // S = Q Kᵀ of one tile
  template <int E> static APART void scores(const bf16* q, const bf16* k, float* s, int rows) {
    multiply<false, deep(E), TILE_M>(q, deep(E), k, 1, 0, s, LD, rows);
  }
  // The unit has no factors: they are applied to a row of the accumulator before the product.
  static INLINE void scale(float* acc, float c) {
    for (int f = 0; f < wide(F); f++) acc[f] *= c;
  }
  // One row of weights, in place: what is written lies at or before what was read.
  static INLINE void narrow(float* w, int n) {
    char* to = (char*)w;
    for (int i = 0; i < n; i += 32, to += 64) {
#ifdef __AVX512BF16__
      const __m512bh x = _mm512_cvtne2ps_pbh(_mm512_load_ps(w + i + 16), _mm512_load_ps(w + i));
#else
      bf16 x[32];
      for (int j = 0; j < 32; j++) x[j] = bf16(w[i + j]);
#endif
      std::memcpy(to, &x, sizeof x);
    }
  }
  // acc = acc + W V over the tiles of a run; `next`: from one tile's values to the next one's
  static APART void accumulate(const float* w, const bf16* v, int tiles, int64_t next, const float*, float* acc,
                               int rows) {
    multiply<true, TILE_M, wide(F)>((const bf16*)(const void*)w, 2 * LD, v, tiles, next, acc, wide(F), rows);
  }
};
using Micro = std::conditional_t<std::is_same_v<T, bf16>, Tiles, Fma>;
#else
using Micro = Fma;
#endif

}  // namespace
