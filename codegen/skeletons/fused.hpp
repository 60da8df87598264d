// The loop of the emitted CPU kernels: attention in one pass over the keys, around the printed `Program`.
//
//     Q [Z, H, P, E]   K [Z, H/G, M, E]   V [Z, H/G, M, F]   out [Z, H, P, F]   S, acc, state: float, a thread's scratch
//
//     unit: items (a tile of queries of one head) that share keys                 threads take units, late queries first
//       for each chunk of key tiles:   pack K and V as the product reads them     no more than the L2 cache holds
//         for each item, each visited tile of its chunk:
//           fetch;   S = Q Kᵀ;   c, W, state = step(S, state);   acc = c·acc + W V
//       out = finish(acc, state)
//
// What is printed before this text: PRODUCTS, E[PRODUCTS], F, TILE_P, TILE_M, CARRIED, T, OUT and struct Program; and SAVED
// where a row hands over so many scalars.

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
#ifdef SAVED
  // [Z, H, P, SAVED]
  float* saved;
#endif
};

namespace {

using Left = Micro::Left;
using Right = Micro::Right;
constexpr int WIDE = Micro::wide(F);

constexpr int64_t CACHE_LINE = 64;
// Packed keys and values of a chunk, and what a unit's items keep: both lie in the L2 cache.
constexpr int64_t CHUNK_BYTES = 512 << 10, ITEMS_BYTES = 512 << 10;
// Units a thread should get, so that their ends differ little.
constexpr int64_t UNITS_A_THREAD = 4;

constexpr int64_t bytes_of(int64_t n) { return up(n, CACHE_LINE); }
constexpr int64_t depths() {
  int64_t out = 0;
  for (int i = 0; i < PRODUCTS; i++) out += Micro::deep(E[i]);
  return out;
}

// Where each part lies. An item: its queries, acc, state and rows; a packed tile: its keys, then its values.
constexpr int64_t KEYS = depths() * TILE_M, PACKED = KEYS + WIDE * TILE_M, TILE_BYTES = PACKED * sizeof(Right);
constexpr int64_t Q_BYTES = bytes_of(depths() * TILE_P * sizeof(Left)), ACC_BYTES = bytes_of(TILE_P * WIDE * sizeof(float));
constexpr int64_t STATE_BYTES = bytes_of(TILE_P * CARRIED * sizeof(float));
constexpr int64_t ROW_BYTES = bytes_of(TILE_P * sizeof(Program::Row));
constexpr int64_t ITEM_BYTES = Q_BYTES + ACC_BYTES + STATE_BYTES + ROW_BYTES;
constexpr int64_t S_BYTES = bytes_of(TILE_P * LD * sizeof(float));
constexpr int64_t FIXED_BYTES = PRODUCTS * S_BYTES + bytes_of(TILE_P * sizeof(float));
constexpr int64_t CHUNK_TILES = std::max<int64_t>(1, CHUNK_BYTES / TILE_BYTES);

struct Item {
  char* at;
  int64_t z, h, p0;
  int rows;
  const uint8_t* classes;

  Left* q() const { return reinterpret_cast<Left*>(at); }
  float* acc() const { return reinterpret_cast<float*>(at + Q_BYTES); }
  float* state(int i) const { return reinterpret_cast<float*>(at + Q_BYTES + ACC_BYTES) + i * CARRIED; }
  Program::Row* row() const { return reinterpret_cast<Program::Row*>(at + Q_BYTES + ACC_BYTES + STATE_BYTES); }
};

struct Unit {
  int64_t z, kv, first, last;
};

// One call: what all threads read.
struct Task {
  const Call& call;
  Program program;
  int64_t group, tiles_p, tiles_m, items, per_unit;

  explicit Task(const Call& c)
      : call(c), program(Program::load(c.tensors, c.sizes)), group(c.H / c.HKV), tiles_p(up(c.P, TILE_P) / TILE_P),
        tiles_m(up(c.M, TILE_M) / TILE_M), items(tiles_p * group) {
    const int64_t wanted = UNITS_A_THREAD * std::max(1, c.threads), fair = up(items * c.Z * c.HKV, wanted) / wanted;
    per_unit = std::max<int64_t>(1, std::min({items, fair, ITEMS_BYTES / ITEM_BYTES}));
  }
  int64_t ranges() const { return up(items, per_unit) / per_unit; }
  int64_t units() const { return call.Z * call.HKV * ranges(); }
  // Later queries first: under a causal mask they have the most keys.
  Unit unit(int64_t u) const {
    const int64_t heads = call.Z * call.HKV, first = (ranges() - 1 - u / heads) * per_unit, at = u % heads;
    return {at / call.HKV, at % call.HKV, first, std::min(first + per_unit, items)};
  }
  int64_t scratch() const { return FIXED_BYTES + std::min(CHUNK_TILES, tiles_m) * TILE_BYTES + per_unit * ITEM_BYTES; }
  // Heads that share keys lie next to one another: item = tile · group + head in the group.
  const uint8_t* classes(int64_t z, int64_t h, int64_t tile) const {
    return call.classes ? call.classes + z * call.class_z + h * call.class_h + tile * call.class_p : nullptr;
  }
};

// A range of key tiles, which of them are packed, and the one after the last of these.
struct Chunk {
  int64_t first, last, next = 0;
  bool packed[CHUNK_TILES] = {};
};

// Rows that will be read or written soon, asked for row by row while the processor computes.
struct Ahead {
  static constexpr int STREAMS = 2 * PRODUCTS + 2;
  struct {
    const char* at;
    int64_t stride, bytes, rows;
  } stream[STREAMS];
  int count = 0;

  template <class N> void add(const N* at, int64_t stride, int64_t size, int64_t rows) {
    stream[count++] = {(const char*)at, stride * int64_t(sizeof(N)), size * int64_t(sizeof(N)), rows};
  }
  INLINE void row(int i) const {
    for (int s = 0; s < count; s++) {
      if (i >= stream[s].rows) continue;
      const char* at = stream[s].at + i * stream[s].stride;
      for (int64_t b = 0; b < stream[s].bytes; b += CACHE_LINE) __builtin_prefetch(at + b, 0, 2);
    }
  }
};

// The work of one thread on one unit.
struct Worker {
  const Task& task;
  const Unit unit;
  char* base;

  float* scores(int i) const { return reinterpret_cast<float*>(base + i * S_BYTES); }
  float* factors() const { return reinterpret_cast<float*>(base + PRODUCTS * S_BYTES); }
  char* items() const { return base + FIXED_BYTES; }
  Right* tile(int64_t i) const { return reinterpret_cast<Right*>(items() + task.per_unit * ITEM_BYTES) + i * PACKED; }

  // Item i, kept at a place of the scratch.
  Item item(int64_t i, int64_t place) const {
    const int64_t t = i / task.group, h = unit.kv * task.group + i % task.group, p0 = t * TILE_P;
    const int rows = int(std::min<int64_t>(TILE_P, task.call.P - p0));
    return {items() + place * ITEM_BYTES, unit.z, h, p0, rows, task.classes(unit.z, h, t)};
  }

  static const T* at(const Operand& o, int64_t z, int64_t h, int64_t n) {
    return static_cast<const T*>(o.data) + z * o.z + h * o.h + n * o.n;
  }
  OUT* out(const Item& x) const {
    return static_cast<OUT*>(task.call.out) + x.z * task.call.out_z + x.h * task.call.out_h + x.p0 * task.call.out_p;
  }

  // The next item's queries and output, and the first tile of keys that is not packed.
  Ahead ahead(int64_t i, int64_t m) const {
    const Call& c = task.call;
    Ahead next;
    if (i < unit.last) {
      const Item x = item(i, 0);
      for (int j = 0; j < PRODUCTS; j++) next.add(at(c.q[j], x.z, x.h, x.p0), c.q[j].n, E[j], x.rows);
      next.add(out(x), c.out_p, F, x.rows);
    }
    const int64_t m0 = m * TILE_M, rows = std::min<int64_t>(TILE_M, c.M - m0);
    for (int j = 0; j < PRODUCTS; j++) next.add(at(c.k[j], unit.z, unit.kv, m0), c.k[j].n, E[j], rows);
    next.add(at(c.v, unit.z, unit.kv, m0), c.v.n, F, rows);
    return next;
  }

  template <int I = 0> void pack_queries(const Item& x, Left* to) const {
    if constexpr (I < PRODUCTS) {
      const Operand& q = task.call.q[I];
      Micro::pack_left<E[I]>(to, at(q, x.z, x.h, x.p0), q.n, x.rows);
      pack_queries<I + 1>(x, to + Micro::deep(E[I]) * TILE_P);
    }
  }

  template <int I = 0> void pack_tile(int64_t m0, int n, Right* to) const {
    const Operand& x = I < PRODUCTS ? task.call.k[I < PRODUCTS ? I : 0] : task.call.v;
    const T* from = at(x, unit.z, unit.kv, m0);
    if constexpr (I < PRODUCTS) {
      Micro::pack_keys<E[I]>(to, from, x.n, n);
      pack_tile<I + 1>(m0, n, to + Micro::deep(E[I]) * TILE_M);
    } else {
      Micro::pack_values(to, from, x.n, n);
    }
  }

  template <int I = 0> void products(const Left* q, const Right* k, int at, int rows) const {
    if constexpr (I < PRODUCTS) {
      Micro::scores<E[I]>(q, k, scores(I) + at, rows);
      products<I + 1>(q + Micro::deep(E[I]) * TILE_P, k + Micro::deep(E[I]) * TILE_M, at, rows);
    }
  }

  // Weights of a run of `tiles` key tiles. WHOLE: the compiler sees that n is a multiple of the vector's length.
  template <bool PARTIAL, bool WHOLE> APART void step(const Item& x, int64_t m0, int tiles, const Ahead& next) const {
    const int n = WHOLE ? tiles * TILE_M : int(task.call.M - m0);
    for (int i = 0; i < x.rows; i++) {
      float* s[PRODUCTS];
      next.row(i);
      for (int j = 0; j < PRODUCTS; j++) s[j] = scores(j) + i * LD;
      const float c = factors()[i] = task.program.template step<PARTIAL>(x.row()[i], s, s[0], x.state(i), m0, n);
      for (int j = n; j < tiles * TILE_M; j++) s[0][j] = 0.0f;
      Micro::scale(x.acc() + i * WIDE, c);
      Micro::narrow(s[0], tiles * TILE_M);
    }
  }

  // Tiles m, m + 1, … of a chunk that begins with c0. Rows past the end are zeros in Q, and nothing reads their results.
  void visit(const Item& x, int64_t c0, int64_t m, int tiles, bool partial, const Ahead& next) const {
    const int64_t m0 = m * TILE_M;
    const int rows = int(up(x.rows, Micro::ROWS));
    // no prefetcher follows rows so short: what the scores read is on its way while their products are computed
    for (int i = 0; i < x.rows; i++) task.program.fetch(x.row()[i], m0, tiles * TILE_M);
    for (int t = 0; t < tiles; t++) products(x.q(), tile(m - c0 + t), t * TILE_M, rows);
    if (m0 + tiles * TILE_M > task.call.M) step<true, false>(x, m0, tiles, next);
    else if (partial) step<true, true>(x, m0, tiles, next);
    else step<false, true>(x, m0, tiles, next);
    Micro::accumulate(scores(0), tile(m - c0) + KEYS, tiles, PACKED, factors(), x.acc(), rows);
  }

  APART void begin(const Item& x) const {
    pack_queries(x, x.q());
    std::fill_n(x.acc(), TILE_P * WIDE, 0.0f);
    for (int i = 0; i < x.rows; i++) {
      Program::start(x.state(i));
      x.row()[i] = task.program.row(x.z, x.h, x.p0 + i);
    }
  }

  APART void end(const Item& x) const {
    for (int i = 0; i < x.rows; i++) {
      task.program.finish(x.row()[i], x.acc() + i * WIDE, x.state(i), out(x) + i * task.call.out_p);
#ifdef SAVED
      task.program.save(x.row()[i], x.state(i), task.call.saved + ((x.z * task.call.H + x.h) * task.call.P + x.p0 + i) * SAVED);
#endif
    }
  }

  void pack(Chunk& c, int64_t m, int tiles) const {
    for (int64_t t = m; t < m + tiles; t++) {
      if (c.packed[t - c.first]) continue;
      pack_tile(t * TILE_M, int(std::min<int64_t>(TILE_M, task.call.M - t * TILE_M)), tile(t - c.first));
      c.packed[t - c.first] = true;
      c.next = std::max(c.next, t + 1);
    }
  }

  // Neighbouring tiles that are not empty become runs of about the same length.
  void visit_chunk(const Item& x, int64_t i, Chunk& c) const {
    bool asked = false;
    const auto seen = [&](int64_t m) { return x.classes ? x.classes[m] : 2; };
    for (int64_t m = c.first, stop; m < c.last; m = stop) {
      for (stop = m; stop < c.last && seen(stop);) stop++;
      for (int64_t runs = up(stop - m, RUN_TILES) / RUN_TILES; runs; runs--) {
        const int tiles = int(up(stop - m, runs) / runs);
        bool partial = false;
        for (int t = 0; t < tiles; t++) partial |= seen(m + t) == 1;
        pack(c, m, tiles);
        visit(x, c.first, m, tiles, partial, asked ? Ahead{} : ahead(i + 1, c.next));
        asked = true;
        m += tiles;
      }
      while (stop < c.last && !seen(stop)) stop++;
    }
  }

  // The first and last tile that an item of the unit sees.
  void range(int64_t& first, int64_t& last) const {
    first = task.tiles_m, last = 0;
    const uint8_t* before = nullptr;
    for (int64_t i = unit.first; i < unit.last; i++) {
      const uint8_t* classes = item(i, 0).classes;
      if (classes && classes == before) continue;
      before = classes;
      int64_t a = 0, b = task.tiles_m;
      while (classes && a < first && !classes[a]) a++;
      while (classes && b > last && !classes[b - 1]) b--;
      first = std::min(first, a), last = std::max(last, b);
    }
  }

  // Where one chunk has all that the unit sees, its items take turns in one place, which stays in the L1 cache.
  void run() const {
    int64_t start, stop;
    range(start, stop);
    stop = std::max(start, stop);
    const int64_t places = stop - start <= CHUNK_TILES ? 0 : 1;
    Chunk c{start, start};
    do {
      c = {c.last, std::min(stop, c.last + CHUNK_TILES), c.last};
      for (int64_t i = unit.first; i < unit.last; i++) {
        const Item x = item(i, (i - unit.first) * places);
        if (c.first == start) begin(x);
        visit_chunk(x, i, c);
        if (c.last == stop) end(x);
      }
    } while (c.last < stop);
  }
};

// One thread: units from the common counter until none is left.
int compute(const Task& task, std::atomic<int64_t>& next) {
  if (!reattend_scratch_1.reserve(task.scratch())) return NO_MEMORY;
  Micro::start();
  for (int64_t u; (u = next++) < task.units();) Worker{task, task.unit(u), reattend_scratch_1.base}.run();
  Micro::stop();
  return DONE;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int attention(const Call* call) {
  if (!call->Z || !call->H || !call->P) return DONE;
  if (!Micro::ready()) return NO_TILES;
  const Task task(*call);
  const int64_t threads = getpid() == home ? std::min<int64_t>(call->threads, task.units()) : 1;
  std::atomic<int64_t> next{0};
  if (threads < 2) return compute(task, next);
  int status = DONE;
#pragma omp parallel num_threads(threads) reduction(max : status)
  status = compute(task, next);
  return status;
}
