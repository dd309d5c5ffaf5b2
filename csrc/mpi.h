#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

struct MPI_ABI_Request;

namespace ts {

/// What ranks of several hosts use of an MPI library, which is found when it is needed: any that has the ABI of MPI 5.0 (chapter 20,
/// "Application Binary Interface"), whose types and constants are fixed, such as libmpi_abi of MPICH 5.
///
/// Calls are for one thread at a time. Those that return an int return 0 (MPI_SUCCESS) or a code for text().
class Mpi {
 public:
  using Request = MPI_ABI_Request *;

  /// Every rank of the run starts it: rank 0's `word` is everybody's after that. `library`: a file; empty: the usual names. Throws Error
  /// (TS_IO) if there is no such library, (TS_LOST_RANK) if it does not start within the time, or knows this process as another rank.
  Mpi(const std::string &library, int32_t rank, int32_t num_ranks, std::span<uint8_t> word, int32_t timeout_ms);
  /// Does not wait for other ranks.
  ~Mpi();
  Mpi(const Mpi &) = delete;
  Mpi &operator=(const Mpi &) = delete;

  int send(const void *data, uint64_t bytes, int32_t to, int32_t tag, Request &request) const;
  int receive(void *data, uint64_t most_bytes, int32_t from, int32_t tag, Request &request) const;
  int barrier(Request &request) const;
  /// Lets the library move what it can; whether all the requests are done.
  int test(std::span<Request> requests, bool &done) const;
  std::string text(int code) const;

  /// All ranks part, when nothing is under way. Waits a short while for the others.
  void finish();

 private:
  struct State;
  std::shared_ptr<State> state_;  // with the thread that starts and finishes the library, which may hang in it
};

}  // namespace ts
