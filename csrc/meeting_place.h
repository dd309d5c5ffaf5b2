#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "file.h"

namespace ts {

/// What shows that a caller belongs to this run, where the system does not say whose process it is.
using Secret = std::array<uint8_t, 32>;

/// Where the ranks of a run meet: rank 0 listens there, and the others come.
class MeetingPlace {
 public:
  virtual ~MeetingPlace() = default;

  /// Rank 0: where callers can be accepted. Throws Error (TS_BAD_REQUEST) if another run is here, (TS_IO).
  virtual FileDescriptor listen(int32_t num_ranks) = 0;
  /// A follower: a socket to rank 0, or none while nobody listens. Throws Error (TS_LOST_RANK, TS_IO).
  virtual FileDescriptor connect() = 0;
  /// The caller's process, 0 if it has to say so itself; none if it must not be heard.
  virtual std::optional<int32_t> process_of(const FileDescriptor &caller) const = 0;
  virtual const Secret &secret() const = 0;  ///< zeros where none is needed
  virtual std::string text() const = 0;      ///< where a follower looked, for messages
};

/// On one host: an abstract Unix socket. It has no file, shows whose process a peer is, and is gone with its socket. Its name is
/// the user's own, in one network namespace.
class LocalPlace : public MeetingPlace {
 public:
  explicit LocalPlace(std::string name) : name_(std::move(name)) {}
  FileDescriptor listen(int32_t num_ranks) override;
  FileDescriptor connect() override;
  std::optional<int32_t> process_of(const FileDescriptor &caller) const override;
  const Secret &secret() const override { return secret_; }
  std::string text() const override;

 private:
  const std::string name_;
  const Secret secret_{};
};

/// Between hosts: a TCP port of rank 0's, whose addresses and secret the other ranks have been told.
class TcpPlace : public MeetingPlace {
 public:
  /// What the others must know.
  struct Word {
    struct Address {
      int32_t family;  ///< AF_INET or AF_INET6
      std::array<uint8_t, 16> bytes;
    };
    uint64_t version = 0;
    Secret secret{};
    int32_t port = 0, num_addresses = 0;
    std::array<Address, 16> addresses{};
  };

  TcpPlace();                            ///< a follower's, which waits for the word
  explicit TcpPlace(int32_t num_ranks);  ///< rank 0's: listens on a free port. Throws Error (TS_IO)

  /// The bytes of the word: what rank 0 tells, and where a follower puts what it was told.
  std::span<uint8_t> word() { return {reinterpret_cast<uint8_t *>(&word_), sizeof(word_)}; }

  FileDescriptor listen(int32_t num_ranks) override;
  FileDescriptor connect() override;
  std::optional<int32_t> process_of(const FileDescriptor &) const override { return 0; }
  const Secret &secret() const override { return word_.secret; }
  std::string text() const override;

 private:
  Word word_;
  FileDescriptor socket_;  // rank 0's listens; a follower's keeps a low number for the one to come
};

}  // namespace ts
