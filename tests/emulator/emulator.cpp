// Runs the blocks of a grid one after the other, the threads of a block as fibres.
//
// A fibre takes one thread of the block after the other and runs each to its end; only a thread
// that has to wait (barrier, warp function) keeps its fibre, and another fibre goes on with the
// threads not yet started. Kernels without barriers thus run as a plain loop.
#include "cuda/device.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastcls::emulator {

namespace {

constexpr size_t kStackBytes = 128 << 10;
// Limits of every device: threads per block, shared memory without opting in, grid along y and z.
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;
constexpr unsigned kMaxGridYZ = 65535;

// A fibre starts by setcontext, on its own stack. From then on it is left and resumed by _setjmp
// and _longjmp, which unlike swapcontext make no system call.
struct Fibre {
  ucontext_t start;
  jmp_buf place;
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
};

struct Block {
  const std::function<void()>* kernel;
  int threads, started, finished;
  bool upwards;
  Meeting barrier;
  std::vector<Warp> warps;
  std::map<const void*, std::vector<char>> shared;
  std::exception_ptr failure;
};

Block block;
std::vector<std::unique_ptr<Fibre>> fibres;
std::vector<Fibre*> idle;  // fibres without a thread
std::deque<Fibre*> ready;  // fibres whose thread may go on
Fibre* current = nullptr;
jmp_buf scheduler;

// AddressSanitizer has to know which stack is in use.
#ifdef __SANITIZE_ADDRESS__
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

void resume(Fibre* fibre) {
  void* fake = nullptr;
  current = fibre;
  leave(&fake, fibre->stack.get(), kStackBytes);
  if (_setjmp(scheduler) == 0) {
    if (fibre->started) _longjmp(fibre->place, 1);
    fibre->started = true;
    setcontext(&fibre->start);
  }
  arrive(fake, false);
}

void suspend() {
  Fibre* self = current;
  void* fake = nullptr;
  leave(&fake, scheduler_stack, scheduler_stack_bytes);
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
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

void fibre_main() {
  arrive(nullptr, true);
  for (;;) {
    while (block.started < block.threads && !block.failure) {
      const int nth = block.started++;
      current->thread = block.upwards ? nth : block.threads - 1 - nth;
      threadIdx.x = current->thread;
      try {
        (*block.kernel)();
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

std::string at_block() {
  return " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
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
  while (block.finished < block.threads) {
    if (!ready.empty()) {
      Fibre* fibre = ready.front();
      ready.pop_front();
      resume(fibre);
    } else if (block.started < block.threads) {
      resume(idle_fibre());
    } else {
      report_stuck();
    }
    if (block.failure) std::rethrow_exception(block.failure);
  }
}

void check_launch(dim3 grid, int threads) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    throw std::runtime_error("emulator: invalid grid " + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z));
  if (threads < 1 || threads > kMaxThreads)
    throw std::runtime_error("emulator: invalid block of " + std::to_string(threads) + " threads");
}

// After a failure fibres hang in the middle of their threads: all are thrown away.
void forget_fibres() {
  ready.clear();
  idle.clear();
  fibres.clear();
}

}  // namespace

void run(dim3 grid, int threads, const std::function<void()>& kernel) {
  check_launch(grid, threads);
  block = Block{};
  block.kernel = &kernel;
  block.threads = threads;
  block.barrier.expected = threads;
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.meeting.expected = 32;
  gridDim = grid;
  blockDim = dim3(threads);
  static bool upwards = false;
  try {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          block.upwards = upwards = !upwards;
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

void* shared_array(const void* site, size_t bytes) {
  auto [found, is_new] = block.shared.try_emplace(site, bytes, char(0xff));
  if (is_new) {
    size_t total = 0;
    for (const auto& [_, array] : block.shared) total += array.size();
    if (total > kMaxSharedBytes)
      throw std::runtime_error("emulator: " + std::to_string(total) +
                               " bytes of shared memory, a block has " +
                               std::to_string(kMaxSharedBytes));
  }
  return found->second.data();
}

}  // namespace fastcls::emulator
