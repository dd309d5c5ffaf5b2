#include "trace.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string_view>

#include "text.h"

namespace ts {
namespace {

constexpr size_t kHead = 3, kTail = 4;  // words of a record, before and behind its own

std::string why(int error) { return std::strerror(error); }

const PageHasher &hasher() {
  static const PageHasher hasher(PageHash{0x9E3779B97F4A7C15, 0xD1B54A32D192ED03});  // nobody's secret
  return hasher;
}

std::array<int32_t, kTail> words_of(const PageHash &sum) { return std::bit_cast<std::array<int32_t, kTail>>(sum); }

}  // namespace

void Checksum::add(std::span<const int32_t> words) {
  if (words.empty()) return;
  PageHash next;
  hasher().pages(sum_, words, static_cast<int32_t>(words.size()), {&next, 1});
  sum_ = next;
}

// ---- writing --------------------------------------------------------------------------------------------------------

TraceWriter::TraceWriter(const std::string &path)
    : path_(path), fd_(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR)) {
  if (fd_.valid()) return;
  if (errno == EEXIST) {
    fail(TS_IO, in_quotes(path), " is there already, and no trace is overwritten: name another file, or remove it");
  }
  fail(TS_IO, in_quotes(path), " cannot be created: ", why(errno));
}

void TraceWriter::add(TraceRecord kind, std::span<const int32_t> words) {
  if (!failure_.empty()) return;
  const size_t begin = buffer_.size(), end = begin + kHead + words.size() + kTail;
  if (end > buffer_.capacity())
    buffer_.reserve(2 * end);  // what follows does not throw: a record is there whole or not
  const auto count = static_cast<int32_t>(words.size());
  buffer_.insert(buffer_.end(), {static_cast<int32_t>(kind), count, ~count});
  buffer_.insert(buffer_.end(), words.begin(), words.end());
  checksum_.add(std::span(buffer_).subspan(begin));
  const auto tail = words_of(checksum_.sum());
  buffer_.insert(buffer_.end(), tail.begin(), tail.end());
  if (buffer_.size() >= kBuffer) flush();
}

void TraceWriter::flush() {
  const auto *at = reinterpret_cast<const char *>(buffer_.data());
  for (size_t left = buffer_.size() * sizeof(int32_t); left > 0;) {
    const ssize_t written = write(fd_.get(), at, left);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      failure_ = in_quotes(path_) + " cannot be written any more: " + why(errno);
      break;
    }
    at += written;
    left -= static_cast<size_t>(written);
  }
  buffer_.clear();
  if (buffer_.capacity() > 4 * kBuffer) buffer_.shrink_to_fit();  // after a long prompt
}

// ---- reading --------------------------------------------------------------------------------------------------------

TraceReader::TraceReader(const std::string &path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  struct stat status{};
  if (!fd_.valid() || fstat(fd_.get(), &status) != 0) fail(TS_IO, in_quotes(path), " cannot be read: ", why(errno));
  if (!S_ISREG(status.st_mode)) fail(TS_IO, in_quotes(path), " is no regular file");
  size_ = static_cast<uint64_t>(status.st_size);
}

/// Reads words `begin` to `begin + count` of the record. False if the file ends before.
bool TraceReader::read(size_t begin, size_t count) {
  if (size_ - at_ < (begin + count) * sizeof(int32_t)) {
    num_cut_off_ = size_ - at_;
    return false;
  }
  record_.resize(begin + count);
  auto *to = reinterpret_cast<char *>(record_.data() + begin);
  uint64_t from = at_ + begin * sizeof(int32_t);
  for (size_t left = count * sizeof(int32_t); left > 0;) {
    const ssize_t got = pread(fd_.get(), to, left, static_cast<off_t>(from));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(TS_IO, in_quotes(path_), " cannot be read: ", why(errno));
    if (got == 0) fail(TS_IO, in_quotes(path_), " has become shorter while it was read");
    to += got;
    from += static_cast<uint64_t>(got);
    left -= static_cast<size_t>(got);
  }
  return true;
}

bool TraceReader::next() {
  if (!read(0, kHead)) return false;
  const int32_t count = record_[1];
  const auto damaged = [this](const char *what) {
    fail(TS_BAD_REQUEST, in_quotes(path_), " is damaged, or no trace: the record at byte ", at_, what);
  };
  if (count < 0 || record_[2] != ~count) damaged(" has no length");
  if (!read(kHead, static_cast<size_t>(count) + kTail)) return false;
  checksum_.add(std::span(record_).first(kHead + static_cast<size_t>(count)));
  const auto tail = words_of(checksum_.sum());
  if (std::memcmp(&record_[record_.size() - kTail], tail.data(), sizeof(tail)) != 0) {
    damaged(" is not what its checksum says");
  }
  kind_ = static_cast<TraceRecord>(record_[0]);
  at_ += record_.size() * sizeof(int32_t);
  return true;
}

// ---- words ----------------------------------------------------------------------------------------------------------

Words &Words::put(int32_t word) {
  words_.push_back(word);
  return *this;
}

Words &Words::put_unsigned(uint64_t value) {
  const auto halves = std::bit_cast<std::array<int32_t, 2>>(value);
  return put(halves[0]).put(halves[1]);
}

Words &Words::put_float(float value) { return put(std::bit_cast<int32_t>(value)); }

Words &Words::put_ints(std::span<const int32_t> ints) {
  put(static_cast<int32_t>(ints.size()));
  words_.insert(words_.end(), ints.begin(), ints.end());
  return *this;
}

Words &Words::put_bytes(std::string_view bytes) {
  put(static_cast<int32_t>(bytes.size()));
  const size_t begin = words_.size();
  words_.resize(begin + (bytes.size() + sizeof(int32_t) - 1) / sizeof(int32_t));
  if (!bytes.empty()) std::memcpy(&words_[begin], bytes.data(), bytes.size());
  return *this;
}

size_t WordReader::take_count() { return static_cast<size_t>(std::max(take(), 0)); }

std::span<const int32_t> WordReader::take(size_t count) {
  if (count > left_.size()) fail(TS_BAD_REQUEST, "a record of the trace is too short: another engine wrote it");
  const std::span<const int32_t> taken = left_.first(count);
  left_ = left_.subspan(count);
  return taken;
}

uint64_t WordReader::take_unsigned() {
  const std::span<const int32_t> halves = take(2);
  return std::bit_cast<uint64_t>(std::array{halves[0], halves[1]});
}

float WordReader::take_float() { return std::bit_cast<float>(take()); }

std::string WordReader::take_bytes() {
  const size_t size = take_count();
  const std::span<const int32_t> words = take((size + sizeof(int32_t) - 1) / sizeof(int32_t));
  return {reinterpret_cast<const char *>(words.data()), size};
}

}  // namespace ts
