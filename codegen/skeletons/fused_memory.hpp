// What the emitted CPU loops share: operands by address and strides, a thread's scratch, what an entry answers.

#include <algorithm>
#include <atomic>

struct Operand {
  const void* data;
  // strides in elements: batch, head, row; the last dimension is contiguous
  int64_t z, h, n;
};

// Scratch of a thread: one block, grown on demand, kept between calls. All kernels of a process share it: it is the one
// symbol besides the entry that is not hidden, and its number changes with its layout.
struct __attribute__((visibility("default"))) ReattendScratch1 {
  char* base = nullptr;
  int64_t size = 0;
  ~ReattendScratch1() { std::free(base); }
  bool reserve(int64_t bytes) {
    if (bytes <= size) return true;
    std::free(base);
    size = (bytes + 4095) / 4096 * 4096;
    base = static_cast<char*>(std::aligned_alloc(4096, size_t(size)));
    if (!base) size = 0;
    return base != nullptr;
  }
};
__attribute__((visibility("default"))) inline thread_local ReattendScratch1 reattend_scratch_1;

namespace {

// What an entry returns.
enum Status { DONE = 0, NO_MEMORY = 1, NO_TILES = 2 };

// A forked process has none of its parent's threads, and the OpenMP library would wait for them.
const pid_t home = getpid();

}  // namespace
