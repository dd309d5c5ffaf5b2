#include "rendezvous.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>

#include "host.h"
#include "patience.h"
#include "shared_group.h"
#include "text.h"

namespace ts {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kMagic = 0x736b6e6172707374;  // "tsprank" and the version of what follows
constexpr size_t kMaxCallers = 2 * static_cast<size_t>(kMaxRanks);
constexpr int kRetry_ms = 10;
constexpr int kGrace_ms = 2000;  // a follower leaves it to rank 0 to say who is late

/// The first message on a socket, from the rank that comes.
struct HelloMessage {
  uint64_t magic = kMagic;
  Secret secret{};
  int32_t rank = 0;
  int32_t pid = 0;
  RankHello hello;
};

/// The answer: with the shared memory's descriptor, or why there is none.
struct AnswerMessage {
  uint64_t magic = kMagic;
  int32_t welcome = 0;
  uint64_t memory_bytes = 0;
  RankLayout layout;
  std::array<char, 800> refusal{};
};

int left_ms(Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, INT32_MAX));
}

/// So that a socket is readable when all of a message of this size is there.
void want_whole(const FileDescriptor &socket, size_t bytes) {
  const auto least = static_cast<int>(bytes);
  setsockopt(socket.get(), SOL_SOCKET, SO_RCVLOWAT, &least, sizeof(least));
}

void send_answer(const FileDescriptor &socket, const AnswerMessage &answer, int fd) {
  iovec part{const_cast<AnswerMessage *>(&answer), sizeof(answer)};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  }
  // Who is gone by now shows as a closed socket.
  static_cast<void>(sendmsg(socket.get(), &message, MSG_NOSIGNAL));
}

/// Rank 0 while it waits for the others.
class Leader {
 public:
  Leader(const RendezvousOptions &options, const RankHello &mine)
      : options_(options),
        sockets_(static_cast<size_t>(options.num_ranks)),
        hellos_(static_cast<size_t>(options.num_ranks), mine),
        pids_(static_cast<size_t>(options.num_ranks)),
        deadline_(Clock::now() + std::chrono::milliseconds(options.timeout_ms)) {
    pids_[0] = getpid();
    for (size_t r = 1; r < options.children.size() && r < pids_.size(); ++r) {
      if (options.children[r] <= 0) continue;
      pids_[r] = options.children[r];
      children_.emplace_back(static_cast<int>(syscall(SYS_pidfd_open, options.children[r], 0)));
      children_ranks_.push_back(static_cast<int32_t>(r));
    }
    listener_ = options.place->listen(options.num_ranks);
  }

  Company gather(RankLayout layout) {
    try {
      while (num_missing() > 0) wait_once();
      share_cores(hellos_, layout);
      layout.num_ranks = options_.num_ranks;
      std::ranges::copy(pids_, layout.pids.begin());
      for (size_t r = 0; r < hellos_.size() && !options_.share_memory; ++r) layout.hosts[r] = hellos_[r].host;
      Company company{layout, nullptr, {}};
      AnswerMessage answer;
      answer.welcome = 1;
      answer.layout = layout;
      if (options_.share_memory) {
        company.memory = std::make_shared<SharedMemory>(SharedGroup::bytes(layout));
        answer.memory_bytes = company.memory->size();
      }
      const int fd = company.memory ? company.memory->fd() : -1;
      for (size_t r = 1; r < sockets_.size(); ++r) send_answer(sockets_[r], answer, fd);
      company.sockets = std::move(sockets_);
      return company;
    } catch (const Error &e) {
      AnswerMessage answer;
      std::ranges::copy(utf8_prefix(e.what(), answer.refusal.size() - 1), answer.refusal.begin());
      for (const FileDescriptor &socket : sockets_) {
        if (socket.valid()) send_answer(socket, answer, -1);
      }
      if (heard_.valid()) send_answer(heard_, answer, -1);
      throw;
    }
  }

 private:
  int64_t num_missing() const {
    return std::ranges::count_if(sockets_, [](const FileDescriptor &s) { return !s.valid(); }) - 1;
  }

  /// Waits for the next thing to happen, and deals with it.
  void wait_once() {
    std::vector<pollfd> polled{{listener_.get(), POLLIN, 0}};
    for (const FileDescriptor &child : children_) polled.push_back({child.get(), POLLIN, 0});
    for (const FileDescriptor &socket : sockets_) polled.push_back({socket.get(), POLLRDHUP, 0});  // -1 is passed over
    for (const FileDescriptor &caller : callers_) polled.push_back({caller.get(), POLLIN, 0});
    const int left = left_ms(deadline_);
    if (left == 0) fail_late();
    if (poll(polled.data(), polled.size(), left) < 0 && errno != EINTR)
      fail(TS_IO, "ranks: poll: ", std::strerror(errno));
    const pollfd *at = polled.data() + 1;
    for (size_t i = 0; i < children_.size(); ++i, ++at) {
      if (at->revents != 0) fail_ended(static_cast<size_t>(children_ranks_[i]));
    }
    for (size_t r = 0; r < sockets_.size(); ++r, ++at) {
      if (at->revents != 0) fail_ended(r);
    }
    std::vector<FileDescriptor> callers = std::exchange(callers_, {});
    for (FileDescriptor &caller : callers) {
      if (at++->revents == 0) {
        callers_.push_back(std::move(caller));
      } else {
        hear(std::move(caller));
      }
    }
    if (polled[0].revents == 0 || callers_.size() >= kMaxCallers) return;
    FileDescriptor caller(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!caller.valid() || !options_.place->process_of(caller)) return;
    want_whole(caller, sizeof(HelloMessage));
    callers_.push_back(std::move(caller));
  }

  /// A caller says who it is.
  void hear(FileDescriptor caller) {
    heard_ = std::move(caller);
    std::array<uint8_t, sizeof(HelloMessage) + 1> bytes;  // longer is wrong, too
    const ssize_t size = recv(heard_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (size <= 0) return;  // went away
    HelloMessage message;
    std::memcpy(&message, bytes.data(), sizeof(message));
    const bool whole = size == sizeof(message) && message.magic == kMagic;
    const Secret &secret = options_.place->secret();
    if (secret != Secret{} && (!whole || message.secret != secret)) {
      heard_ = FileDescriptor();  // whoever that is
      return;
    }
    const int32_t known = options_.place->process_of(heard_).value_or(0);
    const int32_t pid = known != 0 || !whole ? known : message.pid;
    if (!whole) {
      fail(TS_LOST_RANK, "process ", pid, " came as a rank, but is another version of tsruntime than rank 0");
    }
    if (message.rank < 1 || message.rank >= options_.num_ranks) {
      fail(TS_LOST_RANK, "process ", pid, " says that it is rank ", message.rank, " of ", options_.num_ranks,
           ", wanted 1 to ", options_.num_ranks - 1);
    }
    const auto r = static_cast<size_t>(message.rank);
    if (sockets_[r].valid()) {
      fail(TS_LOST_RANK, "processes ", pids_[r], " and ", pid, " both say that they are rank ", r);
    }
    const RankHello &mine = hellos_[0];
    message.hello.host.back() = '\0';
    const std::string_view host = host_of(message.hello);
    if (message.hello.seal != mine.seal) {
      fail(TS_LOST_RANK, rank_name(message.rank, pid, host), " has another plan than rank 0: their seals are ",
           to_hex(message.hello.seal).substr(0, 16), "... and ", to_hex(mine.seal).substr(0, 16), "...");
    }
    if (message.hello.target != mine.target) {
      message.hello.target.back() = '\0';
      fail(TS_LOST_RANK, rank_name(message.rank, pid, host), " would run target ",
           in_quotes(message.hello.target.data()), ", rank 0 runs ", in_quotes(mine.target.data()),
           ": name one with the option for the target");
    }
    want_whole(heard_, 1);
    sockets_[r] = std::move(heard_);
    hellos_[r] = message.hello;
    pids_[r] = pid;
  }

  std::string_view host_of(const RankHello &hello) const { return options_.share_memory ? "" : hello.host.data(); }
  std::string who(size_t rank) const {
    return rank_name(static_cast<int32_t>(rank), pids_[rank], sockets_[rank].valid() ? host_of(hellos_[rank]) : "");
  }

  [[noreturn]] void fail_ended(size_t rank) const { fail(TS_LOST_RANK, who(rank), " ended before all ranks had come"); }

  [[noreturn]] void fail_late() const {
    std::string late;
    for (size_t r = 1; r < sockets_.size(); ++r) {
      if (!sockets_[r].valid()) late += (late.empty() ? "" : ", ") + rank_name(static_cast<int32_t>(r), pids_[r], "");
    }
    fail(TS_LOST_RANK, "not all of ", options_.num_ranks, " ranks came within ", seconds(options_.timeout_ms),
         ": missing is ", late);
  }

  const RendezvousOptions &options_;
  FileDescriptor listener_;
  std::vector<FileDescriptor> children_;  // pidfds; invalid where the system has none
  std::vector<int32_t> children_ranks_;
  std::vector<FileDescriptor> callers_;  // who have not said yet who they are
  FileDescriptor heard_;                 // who says so just now
  std::vector<FileDescriptor> sockets_;  // of those who have, by rank
  std::vector<RankHello> hellos_;
  std::vector<int32_t> pids_;
  const Clock::time_point deadline_;
};

FileDescriptor connect_to_leader(const RendezvousOptions &options, Clock::time_point deadline) {
  for (;;) {
    if (FileDescriptor socket = options.place->connect(); socket.valid()) return socket;
    if (left_ms(deadline) == 0) {
      fail(TS_LOST_RANK, "rank 0 did not come within ", seconds(options.timeout_ms), ": rank ", options.rank,
           " looked for it ", options.place->text());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(kRetry_ms));
  }
}

/// Receives the answer and the descriptor that may come with it.
FileDescriptor receive_answer(const FileDescriptor &socket, AnswerMessage &answer) {
  iovec part{&answer, sizeof(answer)};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t size = recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC);
  if (size == 0 || (size < 0 && errno == ECONNRESET)) fail(TS_LOST_RANK, "rank 0 ended before all ranks had come");
  if (size != sizeof(answer) || answer.magic != kMagic) {
    fail(TS_LOST_RANK, "rank 0 is another version of tsruntime than this rank");
  }
  int fd = -1;
  const cmsghdr *header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
  return FileDescriptor(fd);
}

}  // namespace

RankHello make_hello(const Digest &seal, std::string_view target, int32_t num_threads) {
  RankHello hello;
  hello.seal = seal;
  std::ranges::copy(target.substr(0, hello.target.size() - 1), hello.target.begin());
  hello.num_threads = num_threads;
  hello.usable_cores = usable_cores();
  std::ranges::copy(host_name().substr(0, hello.host.size() - 1), hello.host.begin());
  CPU_ZERO(&hello.cores);
  sched_getaffinity(0, sizeof(hello.cores), &hello.cores);
  return hello;
}

Company lead(const RendezvousOptions &options, const RankHello &mine, RankLayout layout) {
  return Leader(options, mine).gather(layout);
}

Company join(const RendezvousOptions &options, const RankHello &mine) {
  auto deadline = Clock::now() + std::chrono::milliseconds(options.timeout_ms);
  FileDescriptor socket = connect_to_leader(options, deadline);
  HelloMessage hello;
  hello.secret = options.place->secret();
  hello.rank = options.rank;
  hello.pid = getpid();
  hello.hello = mine;
  want_whole(socket, sizeof(AnswerMessage));
  if (send(socket.get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
    fail(TS_LOST_RANK, "rank 0 ended before all ranks had come");
  }
  deadline = Clock::now() + std::chrono::milliseconds(int64_t{options.timeout_ms} + kGrace_ms);
  for (pollfd polled{socket.get(), POLLIN, 0}; poll(&polled, 1, left_ms(deadline)) <= 0;) {
    if (left_ms(deadline) == 0) {
      fail(TS_LOST_RANK, "rank 0 came, but did not answer rank ", options.rank, " within ",
           seconds(options.timeout_ms));
    }
  }
  AnswerMessage answer;
  FileDescriptor memory = receive_answer(socket, answer);
  if (answer.welcome == 0) {
    answer.refusal.back() = '\0';
    fail(TS_LOST_RANK, answer.refusal.data());
  }
  want_whole(socket, 1);
  const uint64_t wanted_bytes = options.share_memory ? SharedGroup::bytes(answer.layout) : 0;
  const bool fits = answer.layout.num_ranks == options.num_ranks && answer.memory_bytes == wanted_bytes &&
                    memory.valid() == options.share_memory;
  if (!fits) fail(TS_LOST_RANK, "rank 0 is another version of tsruntime than this rank");
  Company company{answer.layout, nullptr, {}};
  if (options.share_memory) company.memory = std::make_shared<SharedMemory>(dup(memory.get()), answer.memory_bytes);
  company.sockets.push_back(std::move(socket));
  return company;
}

void share_cores(const std::vector<RankHello> &hellos, RankLayout &layout) {
  for (size_t r = 0; r < hellos.size(); ++r) {
    const RankHello &hello = hellos[r];
    const auto meets = [&](const RankHello &other) {
      cpu_set_t both;
      CPU_AND(&both, &hello.cores, &other.cores);
      return other.host == hello.host && CPU_COUNT(&both) > 0;
    };
    const auto sharers = static_cast<int32_t>(std::max<int64_t>(std::ranges::count_if(hellos, meets), 1));
    layout.num_threads[r] = hello.num_threads > 0 ? hello.num_threads : std::max(1, hello.usable_cores / sharers);
  }
  for (size_t r = 0; r < hellos.size(); ++r) {
    cpu_set_t all;  // of the host
    CPU_ZERO(&all);
    int64_t total = 0, least_usable = INT32_MAX;
    bool quota = false;
    for (size_t q = 0; q < hellos.size(); ++q) {
      const RankHello &hello = hellos[q];
      if (hello.host != hellos[r].host) continue;
      CPU_OR(&all, &all, &hello.cores);
      total += layout.num_threads[q];
      quota |= hello.usable_cores < CPU_COUNT(&hello.cores);
      least_usable = std::min<int64_t>(least_usable, hello.usable_cores);
    }
    const int64_t cores = quota ? least_usable : CPU_COUNT(&all);
    layout.most_turns[r] = total <= cores ? Patience::kMostTurns : 0;
  }
}

}  // namespace ts
