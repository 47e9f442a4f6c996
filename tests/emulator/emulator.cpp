// Runs the blocks of a grid one after the other, the threads of a block as fibres.
//
// A fibre takes one thread of the block after the other and runs each to its end; only a thread
// that has to wait (barrier, warp function) keeps its fibre, and another fibre goes on with the
// threads not yet started. Kernels without barriers thus run as a plain loop.
#include "cuda/device.h"
#include "cuda/tiles.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef FASTCLS_WATCHED_STACKS
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastcls::emulator {

namespace {

constexpr size_t kStackBytes = 128 << 10;
// Limits of every device: threads per block, shared memory without asking for more, grid along y
// and z; and the least shared memory that a launch on a device with matrix units may ask for.
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10, kMaxDynamicBytes = 99 << 10;
constexpr unsigned kMaxGridYZ = 65535;

// A fibre starts by setcontext, on its own stack. From then on it is left and resumed by gcc's own
// setjmp and longjmp: swapcontext makes a system call, and so does AddressSanitizer in longjmp.
using Place = void* [5];

__attribute__((noinline, noreturn)) void jump(Place& to) { __builtin_longjmp(to, 1); }

struct Fibre {
  ucontext_t start;
  Place place;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  int thread = 0;
};

// A place where `expected` threads wait for each other.
struct Meeting {
  int expected;
  std::vector<Fibre*> waiting;
};

struct Warp {
  Meeting meeting;
  // Values of the lanes: two sets used in turns, so that a lane that is ahead by one warp function
  // does not overwrite what others have yet to read.
  uint64_t values[2][32];
  int turn[32];
  MatrixPair matrices[2];
  int matrix_turn[32];
};

struct Copy {
  void* to;
  const void* from;
};

// A thread's asynchronous copies: groups closed, oldest first, and the open one.
struct Copies {
  std::deque<std::vector<Copy>> closed;
  std::vector<Copy> open;
};

struct Block {
  const std::function<void()>* kernel;
  int threads, started, finished;
  bool upwards;  // the order in which threads start
  bool ahead;    // one warp goes as far ahead as barriers let it, or all go on in turns
  Meeting barrier;
  std::vector<Warp> warps;
  std::map<const void*, std::vector<char>> shared;
  std::vector<uint64_t> dynamic;  // aligned to 16 by malloc
  std::vector<Copies> copies;
  std::exception_ptr failure;
};

Block block;
std::vector<std::unique_ptr<Fibre>> fibres;
std::vector<Fibre*> idle;  // fibres without a thread
std::deque<Fibre*> ready;  // fibres whose thread may go on
Fibre* current = nullptr;
Place scheduler;

// AddressSanitizer has to know which stack is in use.
#ifdef FASTCLS_WATCHED_STACKS
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void leave(void** fake, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake, stack, bytes);
}
void arrive(void* fake, bool from_scheduler) {
  if (from_scheduler)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
  else
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
constexpr const void* scheduler_stack = nullptr;
constexpr size_t scheduler_stack_bytes = 0;
void leave(void**, const void*, size_t) {}
void arrive(void*, bool) {}
#endif

__attribute__((noinline)) void resume(Fibre* fibre) {
  void* fake = nullptr;
  current = fibre;
  leave(&fake, fibre->stack.get(), kStackBytes);
  if (__builtin_setjmp(scheduler) == 0) {
    if (fibre->started) jump(fibre->place);
    fibre->started = true;
    setcontext(&fibre->start);
  }
  arrive(fake, false);
}

__attribute__((noinline)) void suspend() {
  Fibre* self = current;
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_stack_bytes);
  if (__builtin_setjmp(self->place) == 0) jump(scheduler);
  arrive(fake, true);
  threadIdx.x = self->thread;
}

void meet(Meeting& meeting) {
  meeting.waiting.push_back(current);
  if (static_cast<int>(meeting.waiting.size()) == meeting.expected) {
    ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  suspend();
}

std::string at_block() {
  return " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

void check_copies_done() {
  Copies& copies = block.copies[threadIdx.x];
  if (!copies.closed.empty() || !copies.open.empty())
    throw std::runtime_error("emulator: thread " + std::to_string(threadIdx.x) +
                             " returned before its asynchronous copies" + at_block());
}

void fibre_main() {
  arrive(nullptr, true);
  for (;;) {
    while (block.started < block.threads && !block.failure) {
      const int nth = block.started++;
      current->thread = block.upwards ? nth : block.threads - 1 - nth;
      threadIdx.x = current->thread;
      try {
        (*block.kernel)();
        check_copies_done();
      } catch (...) {
        block.failure = std::current_exception();
      }
      ++block.finished;
    }
    idle.push_back(current);
    suspend();
  }
}

Fibre* idle_fibre() {
  if (idle.empty()) {
    fibres.push_back(std::make_unique<Fibre>());
    Fibre* fibre = fibres.back().get();
    getcontext(&fibre->start);
    fibre->start.uc_stack.ss_sp = fibre->stack.get();
    fibre->start.uc_stack.ss_size = kStackBytes;
    makecontext(&fibre->start, fibre_main, 0);
    return fibre;
  }
  Fibre* fibre = idle.back();
  idle.pop_back();
  return fibre;
}

[[noreturn]] void report_stuck() {
  std::string text = "emulator: threads wait for ever" + at_block() + ": " +
                     std::to_string(block.finished) + " of " + std::to_string(block.threads) +
                     " threads have returned";
  if (!block.barrier.waiting.empty())
    text += ", __syncthreads reached by " + std::to_string(block.barrier.waiting.size());
  for (size_t w = 0; w < block.warps.size(); ++w)
    if (!block.warps[w].meeting.waiting.empty())
      text += ", warp function reached by " +
              std::to_string(block.warps[w].meeting.waiting.size()) + " lanes of warp " +
              std::to_string(w);
  throw std::runtime_error(text);
}

void run_block() {
  block.started = block.finished = 0;
  for (auto& [site, bytes] : block.shared) std::fill(bytes.begin(), bytes.end(), char(0xff));
  std::fill(block.dynamic.begin(), block.dynamic.end(), ~uint64_t{0});
  while (block.finished < block.threads) {
    if (!ready.empty()) {
      Fibre* fibre = block.ahead ? ready.back() : ready.front();
      block.ahead ? ready.pop_back() : ready.pop_front();
      resume(fibre);
    } else if (block.started < block.threads) {
      resume(idle_fibre());
    } else {
      report_stuck();
    }
    if (block.failure) std::rethrow_exception(block.failure);
  }
}

void check_launch(dim3 grid, int threads, size_t shared_bytes) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    throw std::runtime_error("emulator: invalid grid " + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z));
  if (threads < 1 || threads > kMaxThreads)
    throw std::runtime_error("emulator: invalid block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kMaxDynamicBytes)
    throw std::runtime_error("emulator: launch with " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
}

// After a failure fibres hang in the middle of their threads: all are thrown away.
void forget_fibres() {
  ready.clear();
  idle.clear();
  fibres.clear();
}

}  // namespace

void run(dim3 grid, int threads, const std::function<void()>& kernel, size_t shared_bytes) {
  check_launch(grid, threads, shared_bytes);
  block = Block{};
  block.kernel = &kernel;
  block.threads = threads;
  block.barrier.expected = threads;
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.meeting.expected = 32;
  block.dynamic.resize((shared_bytes + 7) / 8);
  block.copies.resize(threads);
  gridDim = grid;
  blockDim = dim3(threads);
  static unsigned blocks = 0;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          block.upwards = ++blocks % 2 == 1, block.ahead = blocks / 2 % 2 == 1;
          run_block();
        }
  } catch (...) {
    forget_fibres();
    throw;
  }
}

void sync_block() { meet(block.barrier); }

void sync_warp() { meet(block.warps[threadIdx.x / 32].meeting); }

const uint64_t* exchange(uint64_t value) {
  const int lane = threadIdx.x % 32;
  Warp& warp = block.warps[threadIdx.x / 32];
  uint64_t* values = warp.values[warp.turn[lane] ^= 1];
  values[lane] = value;
  meet(warp.meeting);
  return values;
}

MatrixPair& next_matrices() {
  Warp& warp = block.warps[threadIdx.x / 32];
  return warp.matrices[warp.matrix_turn[threadIdx.x % 32] ^= 1];
}

void multiply_add(float (&d)[4], const MatrixPair& pair, int depth) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float *top = pair.a[g], *bottom = pair.a[g + 8];
  float d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
  for (int k = 0; k < depth; ++k) {  // the four sums side by side
    const double left = pair.b[k][2 * t], right = pair.b[k][2 * t + 1];
    // As wide as a product is, which may lie beyond the largest float.
    d0 = static_cast<float>(d0 + top[k] * left), d1 = static_cast<float>(d1 + top[k] * right);
    d2 = static_cast<float>(d2 + bottom[k] * left), d3 = static_cast<float>(d3 + bottom[k] * right);
  }
  d[0] = d0, d[1] = d1, d[2] = d2, d[3] = d3;
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(block.dynamic.data()); }

void check_aligned(const void* pointer, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
    throw std::runtime_error(std::string("emulator: ") + what +
                             " an address that is not aligned to 16" + at_block());
}

void copy_async(void* to, const void* from, bool zeros) {
  check_aligned(to, "asynchronous copy to");
  if (!zeros) check_aligned(from, "asynchronous copy from");
  block.copies[threadIdx.x].open.push_back({to, zeros ? nullptr : from});
}

void copy_async_commit() {
  Copies& copies = block.copies[threadIdx.x];
  copies.closed.push_back(std::move(copies.open));
  copies.open.clear();
}

void copy_async_wait(int latest, void (*copy_16)(void* to, const void* from)) {
  auto& closed = block.copies[threadIdx.x].closed;
  while (static_cast<int>(closed.size()) > latest) {
    for (const Copy& copy : closed.front()) copy_16(copy.to, copy.from);
    closed.pop_front();
  }
}

void* shared_array(const void* site, size_t bytes) {
  auto [found, is_new] = block.shared.try_emplace(site, bytes, char(0xff));
  if (is_new) {
    size_t total = block.dynamic.size() * sizeof(block.dynamic[0]);
    const bool asked = total > fastcls::cuda::kSharedWithoutAsking;
    for (const auto& [_, array] : block.shared) total += array.size();
    const size_t most = asked ? kMaxDynamicBytes : kMaxSharedBytes;
    if (total > most)
      throw std::runtime_error("emulator: " + std::to_string(total) +
                               " bytes of shared memory, a block has " + std::to_string(most));
  }
  return found->second.data();
}

}  // namespace fastcls::emulator
