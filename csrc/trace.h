#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "file.h"
#include "page_hash.h"

namespace ts {

/// What a trace's records are about. In a file the header comes first; then, for each turn of the step thread, what it took in
/// (`submit` and `cancel` in their order, then `turn`) and what it did (`batch`, `result`, `restart`, as far as it came).
enum class TraceRecord : int32_t { header = 1, submit, cancel, turn, batch, result, restart };

/// A checksum over words: a polynomial in GF(2^128) under a key that everyone knows (PageHasher), so that any change of a few bytes is
/// noticed for certain. It keeps no secret and stops no forger.
class Checksum {
 public:
  void add(std::span<const int32_t> words);
  const PageHash &sum() const { return sum_; }

 private:
  PageHash sum_;
};

/// Appends records to a new file, through a buffer.
///
/// A record is little-endian int32: its kind, the number of its words, the complement of that number, the words, and the checksum of
/// the file so far, 4 words. So an end that is torn, because the process was killed, is told from damage.
class TraceWriter {
 public:
  /// Creates the file, which only its user may read: a trace has the prompts in it. Throws Error (TS_IO), also if there is one already.
  explicit TraceWriter(const std::string &path);

  void add(TraceRecord kind, std::span<const int32_t> words);

  /// Hands the buffer to the system, where it survives the process. If the system refuses, that is kept as failure(), and nothing is
  /// written from then on.
  void flush();
  const std::string &failure() const { return failure_; }

 private:
  static constexpr size_t kBuffer = size_t{1} << 16;  // words, from which on it is flushed

  std::string path_;
  FileDescriptor fd_;
  Checksum checksum_;
  std::vector<int32_t> buffer_;
  std::string failure_;
};

/// Reads what TraceWriter wrote, a record at a time.
class TraceReader {
 public:
  explicit TraceReader(const std::string &path);  ///< throws Error (TS_IO)

  /// False at the end, and before a last record that is not whole. Throws Error: TS_BAD_REQUEST where the file is damaged, TS_IO.
  bool next();
  TraceRecord kind() const { return kind_; }
  std::span<const int32_t> words() const { return std::span(record_).subspan(3, record_.size() - 7); }

  uint64_t num_bytes_cut_off() const { return num_cut_off_; }  ///< of that last record, once next() said false
  const std::string &path() const { return path_; }

 private:
  bool read(size_t begin, size_t count);

  std::string path_;
  FileDescriptor fd_;
  Checksum checksum_;
  TraceRecord kind_ = TraceRecord::header;
  std::vector<int32_t> record_;
  uint64_t at_ = 0, size_ = 0;  // bytes
  uint64_t num_cut_off_ = 0;
};

/// The words of one record, put together.
class Words {
 public:
  Words &put(int32_t word);
  Words &put_long(int64_t value) { return put_unsigned(static_cast<uint64_t>(value)); }
  Words &put_unsigned(uint64_t value);
  Words &put_float(float value);
  Words &put_ints(std::span<const int32_t> ints);  ///< their number, then themselves
  Words &put_bytes(std::string_view bytes);
  void clear() { words_.clear(); }
  std::span<const int32_t> words() const { return words_; }

 private:
  std::vector<int32_t> words_;
};

/// And taken apart again, in the same order. Throws Error (TS_BAD_REQUEST) where there are fewer than are asked for.
class WordReader {
 public:
  explicit WordReader(std::span<const int32_t> words) : left_(words) {}
  int32_t take() { return take(1)[0]; }
  int64_t take_long() { return static_cast<int64_t>(take_unsigned()); }
  uint64_t take_unsigned();
  float take_float();
  std::span<const int32_t> take_ints() { return take(take_count()); }
  std::string take_bytes();

 private:
  size_t take_count();
  std::span<const int32_t> take(size_t count);

  std::span<const int32_t> left_;
};

}  // namespace ts
