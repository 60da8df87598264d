// The loop of the emitted CPU kernels for few queries: keys and values as they lie in memory, read once, around the printed
// `Program`.
//
//     Q [Z, H, P, E]   K [Z, H/G, M, E]   V [Z, H/G, M, F]   out [Z, H, P, F]   S [Z, H, P, M]: float
//
//     unit: a segment of the keys of one head, with the rows of all heads that share it        threads take units
//       S = Q Kᵀ                        rows in blocks of at most 8, a key's vectors meet all of a block's
//     row:  W, state = step(S, state)   run by run of its visited tiles; what came earlier is brought up to the last state
//     unit: part = W V
//     row:  out = finish(Σ parts, state)
//
// A row's scores lie in memory as a whole, which is a few bytes a key beside some hundred of the key itself. So segments need no
// merging: their parts belong to one state, and are added up in their order.
// What is printed before this text: PRODUCTS, E[PRODUCTS], F, TILE_P, TILE_M, CARRIED, T, OUT and struct Program.

struct Call {
  Operand q[PRODUCTS], k[PRODUCTS], v;
  void* out;
  int64_t out_z, out_h, out_p;
  int64_t Z, H, HKV, P, M;
  // [.., query tiles, key tiles]: 0 empty, 1 partial, 2 full; null: all full
  const uint8_t* classes;
  int64_t class_z, class_h, class_p;
  int32_t threads;
  const void* const* tensors;
  const int64_t* sizes;
};

namespace {

// Units that a thread should get, so that their ends differ little.
constexpr int64_t UNITS_A_THREAD = 3;
// Rows of a block, and vectors of sums that the registers hold.
constexpr int MOST_ROWS = LANES < 8 ? LANES : 8, SUMS = 16;
// Bytes ahead of what is read that are asked for, into the L2 cache: nearer ones come too late, and further ones leave it.
constexpr int64_t PREFETCH = 32 << 10;
// Tiles whose weights are summed up by themselves: a long sum of small numbers loses them.
constexpr int64_t RUN = std::max<int64_t>(1, 1024 / TILE_M);
constexpr int deep_of(int n) { return int(up(n, LANES)); }
constexpr int WIDE = deep_of(F);
constexpr int64_t queries_width() {
  int64_t out = 0;
  for (int i = 0; i < PRODUCTS; i++) out += deep_of(E[i]);
  return out;
}

template <class N> INLINE const N* at(const Operand& o, int64_t z, int64_t h, int64_t n) {
  return static_cast<const N*>(o.data) + z * o.z + h * o.h + n * o.n;
}

// LANES numbers from memory as floats, all of them there.
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
INLINE Vector whole(const float* from) {
  Vector out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
INLINE Vector whole(const bf16* from) {
  Halves raw;
  std::memcpy(&raw, from, sizeof raw);
  const Words wide = __builtin_convertvector(raw, Words) << 16;
  return bits<Vector>(wide);
}
INLINE Vector whole(const f16* from) { return load(from, LANES); }
// … of which `count` are there; zeros behind them.
template <int WIDTH, class N> INLINE Vector part_of(const N* from, int e) {
  if (WIDTH % LANES == 0 || e + LANES <= WIDTH) return whole(from + e);
  return load(from + e, WIDTH - e);
}

// Lane l of the result is the sum of x[l].
template <int COUNT = LANES> INLINE Vector sums(Vector* x) {
  if constexpr (COUNT == 1) return x[0];
  else {
    constexpr int S = COUNT / 2;
#pragma GCC unroll 16
    for (int i = 0; i < S; i++)
      x[i] = exchange<S, false>(x[i], x[i + S], std::make_integer_sequence<int, LANES>()) +
             exchange<S, true>(x[i], x[i + S], std::make_integer_sequence<int, LANES>());
    return sums<S>(x);
  }
}

struct Unit {
  int64_t z, kv, segment, first, last;
};

// One call: what all threads read, and their common memory.
struct Task {
  const Call& call;
  Program program;
  int64_t group, rows, tiles_m, segments, ld;
  float *queries, *scores, *parts, *states;

  explicit Task(const Call& c)
      : call(c), program(Program::load(c.tensors, c.sizes)), group(c.H / c.HKV), rows(group * c.P),
        tiles_m(up(c.M, TILE_M) / TILE_M), ld(up(c.M, TILE_M) + LANES) {
    const int64_t heads = c.Z * c.HKV, wanted = c.threads < 2 ? 1 : up(UNITS_A_THREAD * c.threads, heads) / heads;
    segments = std::max<int64_t>(1, std::min(wanted, tiles_m));
  }
  int64_t all_rows() const { return call.Z * call.H * call.P; }
  int64_t query_floats() const { return up(rows, MOST_ROWS) * queries_width(); }
  int64_t part_floats() const { return up(rows, MOST_ROWS) * WIDE; }
  int64_t units() const { return call.Z * call.HKV * segments; }
  // Everything in whole cache lines.
  int64_t bytes() const {
    const int64_t floats = call.Z * call.HKV * query_floats() + PRODUCTS * all_rows() * ld + units() * part_floats();
    return int64_t(sizeof(float)) * (floats + up(all_rows() * std::max(1, CARRIED), 16)) + 64;
  }
  void lay(char* base) {
    queries = reinterpret_cast<float*>(base);
    scores = queries + call.Z * call.HKV * query_floats();
    parts = scores + PRODUCTS * all_rows() * ld;
    states = parts + units() * part_floats();
  }
  Unit unit(int64_t u) const {
    const int64_t heads = call.Z * call.HKV, s = u / heads, x = u % heads;
    return {x / call.HKV, x % call.HKV, s, s * tiles_m / segments, (s + 1) * tiles_m / segments};
  }
  // Row r of the rows that share the keys of a head: heads outside, queries inside.
  int64_t head(int64_t kv, int64_t r) const { return kv * group + r / call.P; }
  float* score(int product, int64_t z, int64_t h, int64_t p) const {
    return scores + ((product * call.Z + z) * call.H * call.P + h * call.P + p) * ld;
  }
  float* part(const Unit& u, int64_t r) const {
    return parts + ((u.z * call.HKV + u.kv) * segments + u.segment) * part_floats() + r * WIDE;
  }
  int seen(int64_t z, int64_t h, int64_t p, int64_t m) const {
    if (!call.classes) return 2;
    return call.classes[z * call.class_z + h * call.class_h + p / TILE_P * call.class_p + m];
  }
  // Does any row that shares the keys of a head see a tile?
  bool met(const Unit& u, int64_t m) const {
    if (!call.classes) return true;
    const int64_t heads = call.class_h ? group : 1;
    for (int64_t h = u.kv * group; h < u.kv * group + heads; h++)
      for (int64_t p = 0; p < call.P; p += TILE_P)
        if (seen(u.z, h, p, m)) return true;
    return false;
  }
};

struct Worker {
  const Task& task;

  template <int I = 0> void pack_queries(int64_t z, int64_t kv, float* to) const {
    if constexpr (I < PRODUCTS) {
      const Operand& q = task.call.q[I];
      constexpr int D = deep_of(E[I]);
      for (int64_t r = 0; r < up(task.rows, MOST_ROWS); r++)
        for (int e = 0; e < D; e += LANES)
          *(Vector*)(to + r * D + e) =
              r < task.rows ? part_of<E[I]>(at<T>(q, z, task.head(kv, r), r % task.call.P), e) : Vector{};
      pack_queries<I + 1>(z, kv, to + up(task.rows, MOST_ROWS) * D);
    }
  }

  // Scores of `ROWS` rows from r on, for the keys [m, stop).
  template <int I, int ROWS> APART void block(const Unit& u, const float* q, int64_t r, int64_t m, int64_t stop) const {
    constexpr int D = deep_of(E[I]), KEYS = LANES / ROWS;
    const Operand& k = task.call.k[I];
    float* to[ROWS];
    for (int i = 0; i < ROWS; i++) {
      const int64_t row = std::min<int64_t>(r + i, task.rows - 1);
      to[i] = task.score(I, u.z, task.head(u.kv, row), row % task.call.P);
    }
    for (; m < stop; m += KEYS) {
      const int n = int(std::min<int64_t>(KEYS, stop - m));
      const T* keys[KEYS];
      for (int j = 0; j < KEYS; j++) keys[j] = at<T>(k, u.z, u.kv, m + std::min(j, n - 1));
      Vector s[LANES];
      // one key after the other: memory is read in its order
      for (int j = 0; j < KEYS; j++) {
        Vector t[ROWS] = {};
#pragma GCC unroll 4
        for (int e = 0; e < D; e += LANES) {
          __builtin_prefetch((const char*)(keys[j] + e) + PREFETCH, 0, 2);
          const Vector y = part_of<E[I]>(keys[j], e);
#pragma GCC unroll 16
          for (int i = 0; i < ROWS; i++) t[i] += *(const Vector*)(q + i * D + e) * y;
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) s[i * KEYS + j] = t[i];
      }
      alignas(64) float found[LANES];
      *(Vector*)found = sums(s);
      for (int i = 0; i < ROWS && r + i < task.rows; i++) std::memcpy(to[i] + m, found + i * KEYS, n * sizeof(float));
    }
  }

  // All rows on a tile of keys: the second block finds it in the cache.
  template <int I = 0> void products(const Unit& u, const float* q, int64_t m, int64_t stop) const {
    if constexpr (I < PRODUCTS) {
      constexpr int D = deep_of(E[I]);
      int64_t r = 0;
      for (; r + MOST_ROWS <= task.rows; r += MOST_ROWS) block<I, MOST_ROWS>(u, q + r * D, r, m, stop);
      const int64_t left = task.rows - r;
      if (left > MOST_ROWS / 2) block<I, MOST_ROWS>(u, q + r * D, r, m, stop);
      else if (left > MOST_ROWS / 4) block<I, MOST_ROWS / 2>(u, q + r * D, r, m, stop);
      else if (left > 1) block<I, (MOST_ROWS > 4 ? MOST_ROWS / 4 : 2)>(u, q + r * D, r, m, stop);
      else if (left) block<I, 1>(u, q + r * D, r, m, stop);
      products<I + 1>(u, q + up(task.rows, MOST_ROWS) * D, m, stop);
    }
  }

  // Each tile that a unit's rows meet: `each(first key, last key)`.
  template <class Each> void tiles(const Unit& u, Each each) const {
    for (int64_t m = u.first; m < u.last; m++)
      if (task.met(u, m)) each(m * TILE_M, std::min(task.call.M, (m + 1) * TILE_M));
  }

  void score(const Unit& u) const {
    const float* q = task.queries + (u.z * task.call.HKV + u.kv) * task.query_floats();
    tiles(u, [&](int64_t m, int64_t stop) { products(u, q, m, stop); });
  }

  // A row's weights, all under its last state; 0 in tiles that others alone see.
  void weigh(int64_t row) const {
    const Call& c = task.call;
    const int64_t z = row / (c.H * c.P), h = row / c.P % c.H, p = row % c.P;
    float* const state = task.states + row * CARRIED;
    const Program::Row here = task.program.row(z, h, p);
    Program::start(state);
    float* s[PRODUCTS];
    const auto seen = [&](int64_t m) { return task.seen(z, h, p, m); };
    for (int64_t m = 0, stop; m < task.tiles_m; m = stop) {
      const int kind = seen(m);
      for (stop = m + 1; stop < std::min(task.tiles_m, m + RUN) && seen(stop) == kind;) stop++;
      const int64_t m0 = m * TILE_M, end = std::min(c.M, stop * TILE_M);
      for (int j = 0; j < PRODUCTS; j++) s[j] = task.score(j, z, h, p) + m0;
      if (!kind) {
        if (c.class_h || c.P > TILE_P) std::fill_n(s[0], end - m0, 0.0f);
        continue;
      }
      const int n = int(end - m0);
      const float factor = kind == 1 ? task.program.template step<true>(here, s, s[0], state, m0, n)
                                     : task.program.template step<false>(here, s, s[0], state, m0, n);
      if (factor == 1.0f) continue;
      for (int64_t t = 0; t < m; t++) {
        if (!seen(t)) continue;
        float* const before = task.score(0, z, h, p) + t * TILE_M;
#pragma omp simd
        for (int i = 0; i < TILE_M; i++) before[i] *= factor;
      }
    }
  }

  // part += W V for `ROWS` rows on the keys [m, stop)
  template <int ROWS> APART void add(const Unit& u, int64_t r, int64_t m, int64_t stop) const {
    constexpr int AHEAD = SUMS / ROWS;
    const Operand& v = task.call.v;
    const float* w[ROWS];
    float* to[ROWS];
    for (int i = 0; i < ROWS; i++) {
      const int64_t row = std::min<int64_t>(r + i, task.rows - 1);
      w[i] = task.score(0, u.z, task.head(u.kv, row), row % task.call.P);
      to[i] = task.part(u, r + i);
    }
    for (int f = 0; f < WIDE; f += AHEAD * LANES) {
      const int many = std::min(AHEAD, (WIDE - f) / LANES);
      if (many == AHEAD) columns<ROWS, AHEAD>(u, v, w, to, f, m, stop);
      else
        for (int j = 0; j < many; j++) columns<ROWS, 1>(u, v, w, to, f + j * LANES, m, stop);
    }
  }
  template <int ROWS, int COLUMNS>
  INLINE void columns(const Unit& u, const Operand& v, const float* const* w, float* const* to, int f, int64_t m,
                      int64_t stop) const {
    // what is small beside the earlier sum is summed up before it meets it
    Vector s[ROWS][COLUMNS] = {};
    const T* from = at<T>(v, u.z, u.kv, m);
    for (; m < stop; m++, from += v.n) {
      Vector y[COLUMNS];
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; j++) {
        __builtin_prefetch((const char*)(from + f + j * LANES) + PREFETCH, 0, 2);
        y[j] = part_of<F>(from, f + j * LANES);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const float x = w[i][m];
#pragma GCC unroll 16
        for (int j = 0; j < COLUMNS; j++) s[i][j] += x * y[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 16
      for (int j = 0; j < COLUMNS; j++) *(Vector*)(to[i] + f + j * LANES) += s[i][j];
  }

  void gather(const Unit& u) const {
    std::fill_n(task.part(u, 0), task.part_floats(), 0.0f);
    tiles(u, [&](int64_t m, int64_t stop) {
      int64_t r = 0;
      for (; r + MOST_ROWS <= task.rows; r += MOST_ROWS) add<MOST_ROWS>(u, r, m, stop);
      const int64_t left = task.rows - r;
      if (left > MOST_ROWS / 2) add<MOST_ROWS>(u, r, m, stop);
      else if (left > MOST_ROWS / 4) add<MOST_ROWS / 2>(u, r, m, stop);
      else if (left > 1) add<(MOST_ROWS > 4 ? MOST_ROWS / 4 : 2)>(u, r, m, stop);
      else if (left) add<1>(u, r, m, stop);
    });
  }

  void end(int64_t row) const {
    const Call& c = task.call;
    const int64_t z = row / (c.H * c.P), h = row / c.P % c.H, p = row % c.P, kv = h / task.group;
    const int64_t r = (h % task.group) * c.P + p;
    float* const acc = task.part({z, kv, 0, 0, 0}, r);
    for (int64_t s = 1; s < task.segments; s++) {
      const float* more = task.part({z, kv, s, 0, 0}, r);
#pragma omp simd
      for (int f = 0; f < WIDE; f++) acc[f] += more[f];
    }
    OUT* const out = static_cast<OUT*>(c.out) + z * c.out_z + h * c.out_h + p * c.out_p;
    task.program.finish(task.program.row(z, h, p), acc, task.states + row * CARRIED, out);
  }
};

// What threads share: how far each of the four steps is.
struct Counters {
  std::atomic<int64_t> pack{0}, score{0}, weigh{0}, gather{0}, end{0};
};

template <class Each> INLINE void each(std::atomic<int64_t>& next, int64_t count, Each one) {
  for (int64_t i; (i = next++) < count;) one(i);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int attention(const Call* call) {
  if (!call->Z || !call->H || !call->P) return DONE;
  Task task(*call);
  if (!reattend_scratch_1.reserve(task.bytes())) return NO_MEMORY;
  task.lay(reattend_scratch_1.base);
  const Worker worker{task};
  Counters at;
  const int64_t threads = getpid() == home ? std::max<int64_t>(1, std::min<int64_t>(call->threads, task.units())) : 1;
  const int64_t heads = call->Z * call->HKV;
  const auto pack = [&](int64_t i) {
    worker.pack_queries(i / call->HKV, i % call->HKV, task.queries + i * task.query_floats());
  };
  const auto score = [&](int64_t i) { worker.score(task.unit(i)); };
  const auto weigh = [&](int64_t i) { worker.weigh(i); };
  const auto gather = [&](int64_t i) { worker.gather(task.unit(i)); };
  const auto end = [&](int64_t i) { worker.end(i); };
  if (threads < 2) {
    each(at.pack, heads, pack);
    each(at.score, task.units(), score);
    each(at.weigh, task.all_rows(), weigh);
    each(at.gather, task.units(), gather);
    each(at.end, task.all_rows(), end);
    return DONE;
  }
#pragma omp parallel num_threads(threads)
  {
    each(at.pack, heads, pack);
#pragma omp barrier
    each(at.score, task.units(), score);
#pragma omp barrier
    each(at.weigh, task.all_rows(), weigh);
#pragma omp barrier
    each(at.gather, task.units(), gather);
#pragma omp barrier
    each(at.end, task.all_rows(), end);
  }
  return DONE;
}
