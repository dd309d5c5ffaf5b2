#include "meeting_place.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

#include "sha256.h"
#include "text.h"

namespace ts {
namespace {

constexpr uint64_t kWordVersion = 0x31706d6f63737374;  // "tsscomp" and the version of the word
constexpr int kConnect_ms = 1000;                      // for one address

[[noreturn]] void system_failed(const char *what) { fail(TS_IO, "ranks: ", what, ": ", std::strerror(errno)); }

FileDescriptor make_socket(int family, int type) {
  FileDescriptor made(socket(family, type | SOCK_CLOEXEC, 0));
  if (!made.valid()) system_failed("no socket");
  return made;
}

struct LocalAddress {
  sockaddr_un address{};
  socklen_t size = 0;

  explicit LocalAddress(const std::string &name) {
    const std::string text = std::to_string(getuid()) + "/" + name;
    const Digest digest = sha256({reinterpret_cast<const uint8_t *>(text.data()), text.size()});
    const std::string path = "tsruntime-ranks/" + to_hex(digest);
    address.sun_family = AF_UNIX;
    std::ranges::copy(path, address.sun_path + 1);
    size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  }
  const sockaddr *get() const { return reinterpret_cast<const sockaddr *>(&address); }
};

using Address = TcpPlace::Word::Address;

/// The address that a system's structure holds, if it is of a kind that others can reach.
std::optional<Address> address_of(const sockaddr *found) {
  Address address{};
  if (found == nullptr) return std::nullopt;
  address.family = found->sa_family;
  if (found->sa_family == AF_INET) {
    std::memcpy(address.bytes.data(), &reinterpret_cast<const sockaddr_in *>(found)->sin_addr, 4);
  } else if (found->sa_family == AF_INET6) {
    const auto &in6 = reinterpret_cast<const sockaddr_in6 *>(found)->sin6_addr;
    if (IN6_IS_ADDR_LINKLOCAL(&in6)) return std::nullopt;  // says nothing without an interface
    std::memcpy(address.bytes.data(), &in6, sizeof(in6));
  } else {
    return std::nullopt;
  }
  return address;
}

bool same(const Address &a, const Address &b) { return a.family == b.family && a.bytes == b.bytes; }

/// This host's addresses: those of its networks, or, without any, its own for itself.
std::vector<Address> own_addresses() {
  ifaddrs *all = nullptr;
  if (getifaddrs(&all) != 0) system_failed("getifaddrs");
  std::vector<Address> outer, loopback;
  for (const ifaddrs *at = all; at != nullptr; at = at->ifa_next) {
    if ((at->ifa_flags & IFF_UP) == 0) continue;
    if (const auto address = address_of(at->ifa_addr)) {
      ((at->ifa_flags & IFF_LOOPBACK) != 0 ? loopback : outer).push_back(*address);
    }
  }
  freeifaddrs(all);
  return outer.empty() ? loopback : outer;
}

std::string text_of(const Address &address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  inet_ntop(address.family, address.bytes.data(), text.data(), text.size());
  return text.data();
}

FileDescriptor connect_tcp(const Address &address, int32_t port) {
  sockaddr_storage to{};
  socklen_t size = 0;
  to.ss_family = static_cast<sa_family_t>(address.family);
  if (address.family == AF_INET) {
    auto *in = reinterpret_cast<sockaddr_in *>(&to);
    in->sin_port = htons(static_cast<uint16_t>(port));
    std::memcpy(&in->sin_addr, address.bytes.data(), sizeof(in->sin_addr));
    size = sizeof(*in);
  } else {
    auto *in = reinterpret_cast<sockaddr_in6 *>(&to);
    in->sin6_port = htons(static_cast<uint16_t>(port));
    std::memcpy(&in->sin6_addr, address.bytes.data(), sizeof(in->sin6_addr));
    size = sizeof(*in);
  }
  FileDescriptor made(socket(address.family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made.valid()) return made;
  if (connect(made.get(), reinterpret_cast<const sockaddr *>(&to), size) != 0) {
    pollfd polled{made.get(), POLLOUT, 0};
    int error = 0;
    socklen_t error_size = sizeof(error);
    if (errno != EINPROGRESS || poll(&polled, 1, kConnect_ms) != 1) return FileDescriptor();
    if (getsockopt(made.get(), SOL_SOCKET, SO_ERROR, &error, &error_size) != 0 || error != 0) return FileDescriptor();
  }
  fcntl(made.get(), F_SETFL, 0);  // waits from here on
  return made;
}

}  // namespace

FileDescriptor LocalPlace::listen(int32_t num_ranks) {
  const LocalAddress address(name_);
  FileDescriptor listener = make_socket(AF_UNIX, SOCK_SEQPACKET);
  if (bind(listener.get(), address.get(), address.size) != 0) {
    if (errno != EADDRINUSE) system_failed("bind");
    fail(TS_BAD_REQUEST, "another run on this host has the rendezvous name ", in_quotes(name_), ": choose another");
  }
  if (::listen(listener.get(), num_ranks) != 0) system_failed("listen");
  return listener;
}

FileDescriptor LocalPlace::connect() {
  const LocalAddress address(name_);
  FileDescriptor socket = make_socket(AF_UNIX, SOCK_SEQPACKET);
  if (::connect(socket.get(), address.get(), address.size) == 0) {
    if (!process_of(socket)) fail(TS_LOST_RANK, "rank 0's place is taken by another user's process");
    return socket;
  }
  if (errno != ECONNREFUSED && errno != EINTR && errno != EAGAIN) system_failed("connect");
  return FileDescriptor();
}

std::optional<int32_t> LocalPlace::process_of(const FileDescriptor &caller) const {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (getsockopt(caller.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != getuid()) return std::nullopt;
  return peer.pid;
}

std::string LocalPlace::text() const { return "on this host under the name " + in_quotes(name_); }

// The number: a process that ends closes its sockets in the order of their numbers. One from before MPI's own tells the others that it
// is gone before they can see that MPI's are closed, and nothing is sent to it any more, which MPI might not survive.
TcpPlace::TcpPlace() : socket_(open("/dev/null", O_RDONLY | O_CLOEXEC)) {}

TcpPlace::TcpPlace(int32_t num_ranks) {
  word_.version = kWordVersion;
  if (getrandom(word_.secret.data(), word_.secret.size(), 0) != static_cast<ssize_t>(word_.secret.size())) {
    system_failed("getrandom");
  }
  const std::vector<Address> own = own_addresses();
  word_.num_addresses = static_cast<int32_t>(std::min(own.size(), word_.addresses.size()));
  std::copy_n(own.begin(), word_.num_addresses, word_.addresses.begin());
  // An IPv6 socket takes IPv4, too; where the system has none, IPv4 alone.
  sockaddr_storage any{};
  socklen_t size = sizeof(sockaddr_in6);
  any.ss_family = AF_INET6;
  socket_ = FileDescriptor(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int off = 0;
  if (!socket_.valid() || setsockopt(socket_.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off)) != 0) {
    socket_ = make_socket(AF_INET, SOCK_STREAM);
    any.ss_family = AF_INET;
    size = sizeof(sockaddr_in);
  }
  auto *address = reinterpret_cast<sockaddr *>(&any);
  if (bind(socket_.get(), address, size) != 0) system_failed("bind");
  if (::listen(socket_.get(), num_ranks) != 0) system_failed("listen");
  if (getsockname(socket_.get(), address, &size) != 0) system_failed("getsockname");
  // The port has the same place in both kinds.
  word_.port = ntohs(reinterpret_cast<const sockaddr_in *>(&any)->sin_port);
}

FileDescriptor TcpPlace::listen(int32_t) { return std::move(socket_); }

FileDescriptor TcpPlace::connect() {
  if (word_.version != kWordVersion) fail(TS_LOST_RANK, "rank 0 is another version of tsruntime than this rank");
  std::vector<Address> addresses(word_.addresses.begin(), word_.addresses.begin() + word_.num_addresses);
  const std::vector<Address> own = own_addresses();
  const auto is_own = [&](const Address &a) {
    return std::ranges::any_of(own, [&](const Address &b) { return same(a, b); });
  };
  // On another host than rank 0's, an address that both have leads to oneself.
  if (!std::ranges::all_of(addresses, is_own)) std::erase_if(addresses, is_own);
  for (const Address &address : addresses) {
    const FileDescriptor made = connect_tcp(address, word_.port);
    if (!made.valid()) continue;
    if (dup3(made.get(), socket_.get(), O_CLOEXEC) < 0) system_failed("dup3");
    const int on = 1;
    setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return std::move(socket_);
  }
  return FileDescriptor();
}

std::string TcpPlace::text() const {
  std::string text = "at port " + std::to_string(word_.port) + " of ";
  for (int32_t i = 0; i < word_.num_addresses; ++i) {
    text += (i == 0 ? "" : ", ") + text_of(word_.addresses[static_cast<size_t>(i)]);
  }
  return text;
}

}  // namespace ts
