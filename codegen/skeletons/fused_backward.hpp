// The loop of the emitted CPU backward: gradients of attention in one pass over pairs of tiles, around the printed `Program`.
//
//     Q, dQ [Z, H, P, E]   K, dK [Z, H/G, M, E]   V, dV [Z, H/G, M, F]   out, grad [Z, H, P, F]   saved [Z, H, P, SAVED]
//
//     unit: a segment of the keys of one head, with all queries that see it         threads take units, early keys first
//           (of all heads, where a wanted leaf over pairs is read by all of them: no two units add to one place)
//       for each chunk of key tiles:   pack K, V, Kᵀ and Vᵀ; dK, dV = 0              no more than the L2 cache holds
//         for each head of the group, each tile of queries that sees the chunk:
//           dAcc, scalars = flow(grad, out, saved)
//           for each visited tile:   S = Q Kᵀ;   dW = dAcc Vᵀ;   W, dS = adjoint(S, dW)
//                                    dV += Wᵀ dAcc;   dK += dSᵀ Q;   sums += dS K;   leaves += what reaches them
//       dK, dV of the chunk are written
//     dQ = sums of the segments, in their order;   what reaches leaves of a row's end is written for each row
//
// Every number is added up by one thread in an order that depends on nothing but sizes and the number of threads.
// What is printed before this text: PRODUCTS, E[PRODUCTS], F, TILE_P, TILE_M, SAVED, SCALARS, T, OUT and struct Program. Of
// leaves, floats that are no operands: KEPT read at keys, SUMMED at none and ENDS of a row's end; which are wanted, and whether
// batches or heads are folded into one unit: FOLD_Z, FOLD_H.

// Where the gradient of a leaf gathers: a number for each [segment, Z / div % mod, H, P, M], keys next to one another. A stride
// of 0 stands where it has one for all, of −1 along the queries where it has one for each distance m − p.
struct Kept {
  float* data;
  int64_t segment, div, mod, z, h, p;
};

struct Call {
  Operand q[PRODUCTS], k[PRODUCTS], v, out, grad;
  Operand dq[PRODUCTS], dk[PRODUCTS], dv;
  const float* saved;
  // [segments, Z, H, P up to whole tiles, SUM_WIDTH]
  float* sums;
  int64_t segments;
  int64_t Z, H, HKV, P, M;
  // [.., query tiles, key tiles]: 0 empty, 1 partial, 2 full; null: all full
  const uint8_t* classes;
  int64_t class_z, class_h, class_p;
  int32_t threads;
  // gradients of Q, K and V that somebody wants: bits 0, 1 and 2
  int32_t wanted;
  const void* const* tensors;
  const int64_t* sizes;
  // [KEPT]; [segments, Z, H, P, SUMMED]; [Z, H, P, ENDS]: null where none is wanted
  const Kept* kept;
  float *row_sums, *row_ends;
};

namespace {

constexpr int64_t CHUNK_BYTES = 512 << 10;

// Numbers from one row to the next: whole blocks, and no power of two, so that rows do not share their places in the cache.
constexpr int row_of(int n) { return int(up(n, BLOCK)) + LANES; }
constexpr int deep_of(int n) { return int(up(n, LANES)); }
template <class Each> constexpr int64_t total(Each each) {
  int64_t out = 0;
  for (int i = 0; i < PRODUCTS; i++) out += each(E[i]);
  return out;
}
constexpr int FROW = row_of(F);
constexpr int64_t ROWS_WIDTH = total(row_of), SUM_WIDTH = ROWS_WIDTH;

// A packed tile of keys: Kᵀ, Vᵀ in panels, K in rows; then dK, dV. In floats.
constexpr int64_t KT = total(deep_of) * TILE_M, VT = int64_t(deep_of(F)) * TILE_M, KROWS = ROWS_WIDTH * TILE_M;
constexpr int64_t DV = int64_t(FROW) * TILE_M, KEY_TILE = KT + VT + 2 * KROWS + DV;
constexpr int64_t CHUNK_TILES = std::max<int64_t>(1, CHUNK_BYTES / int64_t(KEY_TILE * sizeof(float)));
// A tile of queries: Q and dAcc in rows, scalars, what belongs to its rows.
constexpr int64_t QROWS = ROWS_WIDTH * TILE_P, DACC = int64_t(FROW) * TILE_P, SCALAR_FLOATS = up(TILE_P * std::max(1, SCALARS), LANES);
constexpr int64_t ROW_FLOATS = up(TILE_P * sizeof(Program::Row), 64) / int64_t(sizeof(float));
// Tiles of a run: the scores of all products and their weights lie in the L1 cache.
constexpr int RUN = std::max<int>(1, SCORES_BYTES / int(sizeof(float)) / ((PRODUCTS + 1) * TILE_P * TILE_M));
constexpr int LDS = RUN * TILE_M + 32;
constexpr int64_t SCORES = int64_t(TILE_P) * LDS;
constexpr int64_t FIXED = QROWS + DACC + SCALAR_FLOATS + ROW_FLOATS + (PRODUCTS + 1) * SCORES;

// out[8, 2 vectors] = (out) + A B over `depth`. A: [i][k], or [k][i] where TURNED; B: rows `ldb` apart.
template <bool ADD, bool TURNED>
INLINE void block(const float* a, int64_t lda, const float* b, int64_t ldb, int depth, float* out, int64_t ldo) {
  // what is small beside the earlier value is summed up before it meets it
  Vector s[BLOCK_ROWS][2] = {};
#pragma GCC unroll 4
  for (int k = 0; k < depth; k++) {
    const Vector b0 = *(const Vector*)(b + k * ldb), b1 = *(const Vector*)(b + k * ldb + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK_ROWS; i++) {
      const float x = TURNED ? a[k * lda + i] : a[i * lda + k];
      s[i][0] += x * b0;
      s[i][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < BLOCK_ROWS; i++)
    for (int j = 0; j < 2; j++) {
      Vector& to = *(Vector*)(out + i * ldo + j * LANES);
      to = ADD ? to + s[i][j] : s[i][j];
    }
}

// out[rows, TILE_M] = A Bᵀ, B packed in panels [column / BLOCK][depth][BLOCK]
template <int DEPTH> APART void across(const float* a, int64_t lda, const float* panels, float* out, int rows) {
  for (int j = 0; j < TILE_M; j += BLOCK)
    for (int i = 0; i < rows; i += BLOCK_ROWS)
      block<false, false>(a + i * lda, lda, panels + j * DEPTH, BLOCK, DEPTH, out + i * LDS + j, LDS);
}

// out[rows, WIDTH] += A B, or Aᵀ B where TURNED; rows of B and out lie row_of(WIDTH) apart
template <bool TURNED, int WIDTH> APART void onto(const float* a, const float* b, int depth, float* out, int rows) {
  constexpr int LD = row_of(WIDTH);
  for (int j = 0; j < WIDTH; j += BLOCK)
    for (int i = 0; i < rows; i += BLOCK_ROWS)
      block<true, TURNED>(a + (TURNED ? i : int64_t(i) * LDS), LDS, b + j, LD, depth, out + int64_t(i) * LD + j, LD);
}

// Rows [n, WIDTH] as floats row_of(WIDTH) apart, zeros to the end of a tile of TILE rows.
template <int WIDTH, int TILE> APART void pack_rows(float* to, const T* from, int64_t stride, int n) {
  for (int i = 0; i < TILE; i++)
    for (int e = 0; e < row_of(WIDTH) - LANES; e += LANES)
      *(Vector*)(to + i * row_of(WIDTH) + e) = i < n ? load(from + i * stride + e, WIDTH - e) : Vector{};
}

template <class N> INLINE const N* at(const Operand& o, int64_t z, int64_t h, int64_t n) {
  return static_cast<const N*>(o.data) + z * o.z + h * o.h + n * o.n;
}

// Rows of floats to where a gradient lies.
template <int WIDTH> void store(const Operand& o, int64_t z, int64_t h, int64_t n0, const float* from, int n) {
  for (int i = 0; i < n; i++) {
    T* const to = const_cast<T*>(at<T>(o, z, h, n0 + i));
#pragma omp simd
    for (int e = 0; e < WIDTH; e++) to[e] = T(from[i * row_of(WIDTH) + e]);
  }
}

struct Unit {
  // batches and heads of keys, from one up to another
  int64_t z0, z1, kv0, kv1;
  int64_t segment, first, last;
};

// One call: what all threads read.
struct Task {
  const Call& call;
  Program program;
  int64_t group, tiles_p, tiles_m;

  explicit Task(const Call& c)
      : call(c), program(Program::load(c.tensors, c.sizes)), group(c.H / c.HKV), tiles_p(up(c.P, TILE_P) / TILE_P),
        tiles_m(up(c.M, TILE_M) / TILE_M) {}
  int64_t batches() const { return FOLD_Z ? 1 : call.Z; }
  int64_t heads() const { return FOLD_H ? 1 : call.HKV; }
  int64_t units() const { return batches() * heads() * call.segments; }
  Unit unit(int64_t u) const {
    const int64_t each = batches() * heads(), s = u / each, z = u % each / heads(), kv = u % heads();
    return {z, FOLD_Z ? call.Z : z + 1, kv, FOLD_H ? call.HKV : kv + 1,
            s, s * tiles_m / call.segments, (s + 1) * tiles_m / call.segments};
  }
  int64_t scratch() const { return int64_t(sizeof(float)) * (FIXED + std::min(CHUNK_TILES, tiles_m) * KEY_TILE); }
  const uint8_t* classes(int64_t z, int64_t h, int64_t tile) const {
    return call.classes ? call.classes + z * call.class_z + h * call.class_h + tile * call.class_p : nullptr;
  }
  // Sums of one segment over the queries of a tile.
  float* sums(int64_t segment, int64_t z, int64_t h, int64_t tile) const {
    return call.sums + (((segment * call.Z + z) * call.H + h) * tiles_p + tile) * TILE_P * SUM_WIDTH;
  }
};

// The work of one thread on one unit.
struct Worker {
  const Task& task;
  const Unit unit;
  float* base;
  // whose keys are at hand
  int64_t z = 0, kv = 0;

  float* q() const { return base; }
  float* dacc() const { return base + QROWS; }
  float* scalars() const { return dacc() + DACC; }
  Program::Row* row() const { return reinterpret_cast<Program::Row*>(scalars() + SCALAR_FLOATS); }
  float* scores(int i) const { return scalars() + SCALAR_FLOATS + ROW_FLOATS + i * SCORES; }
  float* weights() const { return scores(PRODUCTS); }
  float* tile(int64_t i) const { return base + FIXED + i * KEY_TILE; }

  template <int I = 0> void pack_queries(int64_t h, int64_t p0, int rows, float* to) const {
    if constexpr (I < PRODUCTS) {
      const Operand& x = task.call.q[I];
      pack_rows<E[I], TILE_P>(to, at<T>(x, z, h, p0), x.n, rows);
      pack_queries<I + 1>(h, p0, rows, to + row_of(E[I]) * TILE_P);
    }
  }
  template <int I = 0> void pack_keys(int64_t m0, int n, float* turned, float* rows) const {
    if constexpr (I < PRODUCTS) {
      const Operand& x = task.call.k[I];
      const T* from = at<T>(x, z, kv, m0);
      Fma::pack_keys<E[I]>(turned, from, x.n, n);
      pack_rows<E[I], TILE_M>(rows, from, x.n, n);
      pack_keys<I + 1>(m0, n, turned + deep_of(E[I]) * TILE_M, rows + row_of(E[I]) * TILE_M);
    }
  }
  APART void pack(int64_t m, float* to) const {
    const int64_t m0 = m * TILE_M;
    const int n = int(std::min<int64_t>(TILE_M, task.call.M - m0));
    pack_keys(m0, n, to, to + KT + VT);
    const Operand& v = task.call.v;
    Fma::pack_keys<F>(to + KT, at<T>(v, z, kv, m0), v.n, n);
    std::fill_n(to + KT + VT + KROWS, KROWS + DV, 0.0f);
  }
  template <int I = 0> void write_keys(int64_t m0, int n, const float* from) const {
    if constexpr (I < PRODUCTS) {
      store<E[I]>(task.call.dk[I], z, kv, m0, from, n);
      write_keys<I + 1>(m0, n, from + row_of(E[I]) * TILE_M);
    }
  }
  APART void write(int64_t m, const float* from) const {
    const int64_t m0 = m * TILE_M;
    const int n = int(std::min<int64_t>(TILE_M, task.call.M - m0));
    if (task.call.wanted & 2) write_keys(m0, n, from + KT + VT + KROWS);
    if (task.call.wanted & 4) store<F>(task.call.dv, z, kv, m0, from + KT + VT + 2 * KROWS, n);
  }

  APART void begin(int64_t h, int64_t p0, int rows) const {
    const Call& c = task.call;
    pack_queries(h, p0, rows, q());
    for (int i = 0; i < rows; i++) {
      const int64_t p = p0 + i;
      row()[i] = task.program.row(z, h, p);
      const float* saved = c.saved + ((z * c.H + h) * c.P + p) * SAVED;
      task.program.flow(row()[i], saved, at<OUT>(c.out, z, h, p), at<OUT>(c.grad, z, h, p), dacc() + i * FROW,
                        scalars() + i * SCALARS);
      std::fill_n(dacc() + i * FROW + F, FROW - F, 0.0f);
    }
    std::fill_n(dacc() + rows * FROW, (TILE_P - rows) * FROW, 0.0f);
  }

  template <int I = 0> void products(const float* q, const float* k, int to, int rows) const {
    if constexpr (I < PRODUCTS) {
      across<deep_of(E[I])>(q, row_of(E[I]), k, scores(I) + to, rows);
      products<I + 1>(q + row_of(E[I]) * TILE_P, k + deep_of(E[I]) * TILE_M, to, rows);
    }
  }
  template <int I = 0> void add_keys(const float* q, float* dk, int from, int rows) const {
    if constexpr (I < PRODUCTS) {
      onto<true, E[I]>(scores(I) + from, q, rows, dk, TILE_M);
      add_keys<I + 1>(q + row_of(E[I]) * TILE_P, dk + row_of(E[I]) * TILE_M, from, rows);
    }
  }
  template <int I = 0> void add_queries(const float* k, float* sums, int from, int rows) const {
    if constexpr (I < PRODUCTS) {
      onto<false, E[I]>(scores(I) + from, k, TILE_M, sums, rows);
      add_queries<I + 1>(k + row_of(E[I]) * TILE_M, sums + row_of(E[I]) * TILE_P, from, rows);
    }
  }

  // WHOLE: the compiler sees that n is a multiple of the vector's length.
  template <bool PARTIAL, bool WHOLE> APART void adjoint(int64_t h, int64_t p0, int rows, int64_t m0, int tiles) const {
    const Call& c = task.call;
    const int n = WHOLE ? tiles * TILE_M : int(c.M - m0);
    float* kept[KEPT + 1] = {};
    float* summed = nullptr;
    if (KEPT && c.kept)
      for (int j = 0; j < KEPT; j++) {
        const Kept& g = c.kept[j];
        kept[j] = g.data + unit.segment * g.segment + z / g.div % g.mod * g.z + h * g.h + p0 * g.p + m0;
      }
    if (SUMMED && c.row_sums) summed = c.row_sums + (((unit.segment * c.Z + z) * c.H + h) * c.P + p0) * SUMMED;
    for (int i = 0; i < rows; i++) {
      float* s[PRODUCTS];
      for (int j = 0; j < PRODUCTS; j++) s[j] = scores(j) + i * LDS;
      float* const w = weights() + i * LDS;
      task.program.template adjoint<PARTIAL>(row()[i], scalars() + i * SCALARS, s, w, kept, summed, m0, n);
      if (KEPT && c.kept)
        for (int j = 0; j < KEPT; j++) kept[j] += c.kept[j].p;
      if (SUMMED && summed) summed += SUMMED;
      for (int j = n; j < tiles * TILE_M; j++) {
        w[j] = 0.0f;
        for (int k = 0; k < PRODUCTS; k++) s[k][j] = 0.0f;
      }
    }
  }

  // Tiles m, m + 1, … of a chunk that begins with c0.
  void visit(int64_t c0, int64_t m, int tiles, bool partial, int64_t h, int64_t p0, int rows, float* sums) const {
    const int64_t m0 = m * TILE_M;
    const int whole = int(up(rows, BLOCK_ROWS));
    for (int i = 0; i < rows; i++) task.program.fetch(row()[i], m0, tiles * TILE_M);
    for (int t = 0; t < tiles; t++) {
      const float* x = tile(m - c0 + t);
      products(q(), x, t * TILE_M, whole);
      across<deep_of(F)>(dacc(), FROW, x + KT, weights() + t * TILE_M, whole);
    }
    if (m0 + tiles * TILE_M > task.call.M) adjoint<true, false>(h, p0, rows, m0, tiles);
    else if (partial) adjoint<true, true>(h, p0, rows, m0, tiles);
    else adjoint<false, true>(h, p0, rows, m0, tiles);
    for (int t = 0; t < tiles; t++) {
      float* x = tile(m - c0 + t);
      if (task.call.wanted & 4) onto<true, F>(weights() + t * TILE_M, dacc(), rows, x + KT + VT + 2 * KROWS, TILE_M);
      if (task.call.wanted & 2) add_keys(q(), x + KT + VT + KROWS, t * TILE_M, rows);
      if (task.call.wanted & 1) add_queries(x + KT + VT, sums, t * TILE_M, whole);
    }
  }

  // All tiles of a chunk that a tile of queries sees, neighbours as runs.
  void visit_chunk(int64_t h, int64_t tile, int64_t first, int64_t last) const {
    const uint8_t* classes = task.classes(z, h, tile);
    const auto seen = [&](int64_t m) { return classes ? classes[m] : 2; };
    const int64_t p0 = tile * TILE_P;
    const int rows = int(std::min<int64_t>(TILE_P, task.call.P - p0));
    float* const sums = task.sums(unit.segment, z, h, tile);
    bool begun = false;
    for (int64_t m = first; m < last;) {
      if (!seen(m)) {
        m++;
        continue;
      }
      int tiles = 0;
      bool partial = false;
      for (; tiles < RUN && m + tiles < last && seen(m + tiles); tiles++) partial |= seen(m + tiles) == 1;
      if (!begun) begin(h, p0, rows);
      begun = true;
      visit(first, m, tiles, partial, h, p0, rows, sums);
      m += tiles;
    }
  }

  void run() {
    for (z = unit.z0; z < unit.z1; z++)
      for (kv = unit.kv0; kv < unit.kv1; kv++) run_head();
  }
  void run_head() const {
    const int64_t g0 = kv * task.group;
    if (task.call.wanted & 1)
      for (int64_t h = g0; h < g0 + task.group; h++)
        std::fill_n(task.sums(unit.segment, z, h, 0), task.tiles_p * TILE_P * SUM_WIDTH, 0.0f);
    for (int64_t c = unit.first; c < unit.last; c += CHUNK_TILES) {
      const int64_t stop = std::min(unit.last, c + CHUNK_TILES);
      for (int64_t m = c; m < stop; m++) pack(m, tile(m - c));
      for (int64_t h = g0; h < g0 + task.group; h++)
        for (int64_t t = 0; t < task.tiles_p; t++) visit_chunk(h, t, c, stop);
      for (int64_t m = c; m < stop; m++) write(m, tile(m - c));
    }
  }
};

// One tile of dQ: the sums of all segments, in their order.
template <int I = 0> void write_queries(const Task& task, int64_t z, int64_t h, int64_t tile, int64_t from = 0) {
  if constexpr (I < PRODUCTS) {
    constexpr int64_t SIZE = int64_t(row_of(E[I])) * TILE_P;
    float* const first = task.sums(0, z, h, tile) + from;
    for (int64_t s = 1; s < task.call.segments; s++) {
      const float* more = task.sums(s, z, h, tile) + from;
#pragma omp simd
      for (int64_t i = 0; i < SIZE; i++) first[i] += more[i];
    }
    const int64_t p0 = tile * TILE_P;
    store<E[I]>(task.call.dq[I], z, h, p0, first, int(std::min<int64_t>(TILE_P, task.call.P - p0)));
    write_queries<I + 1>(task, z, h, tile, from + SIZE);
  }
}

// What reaches the leaves of the ends of a tile's rows.
template <class Asked> void write_ends(const Asked& task, int64_t z, int64_t h, int64_t tile) {
  const Call& c = task.call;
  float dacc[FROW], scalars[SCALARS + 1];
  for (int64_t p = tile * TILE_P; p < std::min((tile + 1) * TILE_P, c.P); p++) {
    const int64_t at_row = (z * c.H + h) * c.P + p;
    const Program::Row row = task.program.row(z, h, p);
    task.program.flow(row, c.saved + at_row * SAVED, at<OUT>(c.out, z, h, p), at<OUT>(c.grad, z, h, p), dacc, scalars);
    task.program.ended(row, scalars, c.row_ends + at_row * ENDS);
  }
}

// One thread: units from the common counter until none is left.
int compute(const Task& task, std::atomic<int64_t>& next) {
  if (!reattend_scratch_1.reserve(task.scratch())) return NO_MEMORY;
  float* const base = reinterpret_cast<float*>(reattend_scratch_1.base);
  for (int64_t u; (u = next++) < task.units();) Worker{task, task.unit(u), base}.run();
  return DONE;
}
void finish(const Task& task, std::atomic<int64_t>& next) {
  const int64_t all = task.call.Z * task.call.H * task.tiles_p;
  for (int64_t u; (u = next++) < all;) {
    const int64_t z = u / task.tiles_p / task.call.H, h = u / task.tiles_p % task.call.H, tile = u % task.tiles_p;
    if (task.call.wanted & 1) write_queries(task, z, h, tile);
    if constexpr (ENDS > 0)
      if (task.call.row_ends) write_ends(task, z, h, tile);
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t sum_width() { return SUM_WIDTH; }

extern "C" __attribute__((visibility("default"))) int backward(const Call* call) {
  if (!call->Z || !call->H) return DONE;
  const Task task(*call);
  const int64_t threads = getpid() == home ? std::min<int64_t>(call->threads, std::max(task.units(), task.tiles_p)) : 1;
  std::atomic<int64_t> next{0}, end{0};
  int status = DONE;
  if (threads < 2) status = compute(task, next);
  else {
#pragma omp parallel num_threads(threads) reduction(max : status)
    status = compute(task, next);
  }
  if (status || !((call->wanted & 1) || call->row_ends)) return status;
  if (threads < 2) finish(task, end);
  else {
#pragma omp parallel num_threads(threads)
    finish(task, end);
  }
  return DONE;
}
