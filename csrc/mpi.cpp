#include "mpi.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "host.h"
#include "no_signals.h"
#include "text.h"

// Handles of the ABI are pointers to types that nobody completes.
struct MPI_ABI_Comm;
struct MPI_ABI_Datatype;
struct MPI_ABI_Errhandler;

namespace ts {
namespace {

using Comm = MPI_ABI_Comm *;
using Datatype = MPI_ABI_Datatype *;
using Errhandler = MPI_ABI_Errhandler *;
using Request = Mpi::Request;

// Constants of the ABI: MPI 5.0, appendix A.
constexpr uintptr_t kCommWorld = 0x101, kCommSelf = 0x102, kErrorsReturn = 0x143, kByte = 0x247;
constexpr int kThreadSerialized = 2048;
constexpr int kMaxErrorString = 512;
constexpr int kAbiMajor = 1;

constexpr std::array kNames = {"libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi_abi.so"};
constexpr std::chrono::milliseconds kFinish{1000};

template <class Handle>
Handle handle(uintptr_t value) {
  return reinterpret_cast<Handle>(value);  // NOLINT(performance-no-int-to-ptr): that is how the ABI defines them
}

struct Functions {
  int (*abi_get_version)(int *, int *);
  int (*init_thread)(int *, char ***, int, int *);
  int (*comm_set_errhandler)(Comm, Errhandler);
  int (*comm_rank)(Comm, int *);
  int (*comm_size)(Comm, int *);
  int (*bcast)(void *, int, Datatype, int, Comm);
  int (*isend)(const void *, int64_t, Datatype, int, int, Comm, Request *);
  int (*irecv)(void *, int64_t, Datatype, int, int, Comm, Request *);
  int (*ibarrier)(Comm, Request *);
  int (*testall)(int, Request *, int *, void *);
  int (*error_string)(int, char *, int *);
  int (*finalize)();
};

/// The file itself, or else the usual names: as the system finds libraries, and where pip puts them beside this executable.
void *open_library(const std::string &library) {
  std::vector<std::string> names = {library};
  if (library.empty()) {
    names.assign(kNames.begin(), kNames.end());
    names.push_back(executable_folder() + "/../lib/" + kNames[0]);
  }
  std::string tried;
  for (const std::string &name : names) {
    if (void *opened = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return opened;
    const char *why = dlerror();
    tried += std::string(tried.empty() ? "" : "; ") + (why == nullptr ? name : why);
  }
  fail(TS_IO,
       "the ranks of this run lie on several hosts, which takes an MPI library with the standard ABI, such as MPICH 5 ",
       "(pip install mpich): put it on the library path, or name its libmpi_abi.so in TSRUNTIME_MPI. Tried: ", tried);
}

Functions find_functions(const std::string &library) {
  void *opened = open_library(library);
  Functions f{};
  const auto find = [&](auto &function, const char *name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(opened, name));
    if (function == nullptr) {
      fail(TS_IO, "the MPI library", library.empty() ? "" : " ", library, " has no ", name,
           ": wanted one with the ABI of MPI 5.0, such as libmpi_abi.so of MPICH 5");
    }
  };
  find(f.abi_get_version, "MPI_Abi_get_version");
  find(f.init_thread, "MPI_Init_thread");
  find(f.comm_set_errhandler, "MPI_Comm_set_errhandler");
  find(f.comm_rank, "MPI_Comm_rank");
  find(f.comm_size, "MPI_Comm_size");
  find(f.bcast, "MPI_Bcast");
  find(f.isend, "MPI_Isend_c");
  find(f.irecv, "MPI_Irecv_c");
  find(f.ibarrier, "MPI_Ibarrier");
  find(f.testall, "MPI_Testall");
  find(f.error_string, "MPI_Error_string");
  find(f.finalize, "MPI_Finalize");
  int major = -1, minor = -1;
  f.abi_get_version(&major, &minor);
  if (major != kAbiMajor) {
    fail(TS_IO, "the MPI library has version ", major, ".", minor, " of the standard ABI, wanted ", kAbiMajor);
  }
  return f;
}

}  // namespace

struct Mpi::State {
  const Functions mpi;
  std::vector<uint8_t> word;
  std::mutex mutex;  // guards the following
  std::condition_variable changed;
  bool started = false, finish = false, finished = false;
  std::string failure;
  int rank = -1, num_ranks = -1;

  explicit State(const std::string &library) : mpi(find_functions(library)) {}

  std::string text(int code) const {
    std::array<char, kMaxErrorString + 1> text{};
    int length = 0;
    if (mpi.error_string(code, text.data(), &length) != 0) return "error " + std::to_string(code);
    return text.data();
  }

  std::string start() {
    int provided = 0;
    const Comm world = handle<Comm>(kCommWorld);
    if (int code = mpi.init_thread(nullptr, nullptr, kThreadSerialized, &provided)) return text(code);
    if (provided < kThreadSerialized) return "it is built for one thread";
    for (const uintptr_t comm : {kCommWorld, kCommSelf}) {
      mpi.comm_set_errhandler(handle<Comm>(comm), handle<Errhandler>(kErrorsReturn));
    }
    mpi.comm_rank(world, &rank);
    mpi.comm_size(world, &num_ranks);
    if (int code = mpi.bcast(word.data(), static_cast<int>(word.size()), handle<Datatype>(kByte), 0, world)) {
      return text(code);
    }
    return {};
  }

  /// The library's own thread: it may wait for ranks that do not come, for ever.
  void live() {
    std::string why = start();
    std::unique_lock lock(mutex);
    failure = std::move(why);
    started = true;
    changed.notify_all();
    if (!failure.empty()) return;
    changed.wait(lock, [this] { return finish; });
    lock.unlock();
    mpi.finalize();
    lock.lock();
    finished = true;
    changed.notify_all();
  }
};

Mpi::Mpi(const std::string &library, int32_t rank, int32_t num_ranks, std::span<uint8_t> word, int32_t timeout_ms)
    : state_(std::make_shared<State>(library)) {
  state_->word.assign(word.begin(), word.end());
  const NoSignals no_signals;
  std::thread([state = state_] { state->live(); }).detach();
  std::unique_lock lock(state_->mutex);
  if (!state_->changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return state_->started; })) {
    const std::string late = num_ranks == 2 ? "rank " + std::to_string(1 - rank) + " did not"
                                            : "not all did: missing is who does not say this, too";
    fail(TS_LOST_RANK, "rank ", rank, " of ", num_ranks, " on ", host_name(), " waited ", seconds(timeout_ms),
         " for the others to start MPI, and ", late);
  }
  if (!state_->failure.empty()) fail(TS_LOST_RANK, "rank ", rank, ": MPI does not start: ", state_->failure);
  if (state_->rank != rank || state_->num_ranks != num_ranks) {
    fail(TS_LOST_RANK, "the launcher says rank ", rank, " of ", num_ranks, ", but the MPI library says ", state_->rank,
         " of ", state_->num_ranks, ": start the ranks with the library's own mpirun");
  }
  std::ranges::copy(state_->word, word.begin());
}

Mpi::~Mpi() = default;

int Mpi::send(const void *data, uint64_t bytes, int32_t to, int32_t tag, Request &request) const {
  return state_->mpi.isend(data, static_cast<int64_t>(bytes), handle<Datatype>(kByte), to, tag,
                           handle<Comm>(kCommWorld), &request);
}

int Mpi::receive(void *data, uint64_t most_bytes, int32_t from, int32_t tag, Request &request) const {
  return state_->mpi.irecv(data, static_cast<int64_t>(most_bytes), handle<Datatype>(kByte), from, tag,
                           handle<Comm>(kCommWorld), &request);
}

int Mpi::barrier(Request &request) const { return state_->mpi.ibarrier(handle<Comm>(kCommWorld), &request); }

int Mpi::test(std::span<Request> requests, bool &done) const {
  int all = 0;
  const int code = state_->mpi.testall(static_cast<int>(requests.size()), requests.data(), &all, nullptr);
  done = all != 0;
  return code;
}

std::string Mpi::text(int code) const { return state_->text(code); }

void Mpi::finish() {
  std::unique_lock lock(state_->mutex);
  if (state_->finish || !state_->failure.empty()) return;
  state_->finish = true;
  state_->changed.notify_all();
  state_->changed.wait_for(lock, kFinish, [this] { return state_->finished; });
}

}  // namespace ts
