#include "tier_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <string>
#include <vector>

#include "expect.h"

namespace ts {
namespace {

constexpr uint64_t kPiece = 192;

using testing::Folder;
using Piece = std::array<uint8_t, kPiece>;

Piece piece_of(int32_t n) {
  Piece bytes;
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(static_cast<size_t>(n) * 31 + i * 7);
  return bytes;
}

/// The files without a name that this process has open, as paths under /proc.
std::vector<std::string> unnamed_files(const std::string &folder) {
  std::vector<std::string> found;
  for (const auto &entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (target.starts_with(std::filesystem::canonical(folder).string()) && target.ends_with("(deleted)"))
      found.push_back(entry.path());
  }
  return found;
}

void expect_what_was_stored(TierStore &store) {
  for (int32_t slot = 0; slot < 3; ++slot) {
    for (int32_t i = 0; i < 2; ++i) EXPECT_TRUE(store.store(slot, i, piece_of(10 * slot + i).data()));
  }
  EXPECT_TRUE(store.store(1, 0, piece_of(99).data()));
  for (int32_t slot = 0; slot < 3; ++slot) {
    for (int32_t i = 0; i < 2; ++i) {
      Piece bytes{};
      EXPECT_TRUE(store.load(slot, i, bytes.data()));
      EXPECT_EQ(bytes, slot == 1 && i == 0 ? piece_of(99) : piece_of(10 * slot + i));
    }
  }
}

TEST(TierStore, GivesBackWhatWasStored) {
  TierStore memory(3, 2, kPiece, "");
  expect_what_was_stored(memory);
  const Folder folder;
  TierStore file(3, 2, kPiece, folder / "");
  expect_what_was_stored(file);
}

TEST(TierStore, ItsFileIsForNobodyElseAndEndsWithTheProcess) {
  const Folder folder;
  const TierStore store(3, 2, kPiece, folder / "");
  EXPECT_TRUE(std::filesystem::is_empty(folder / "")) << "it has no name";
  const std::vector<std::string> files = unnamed_files(folder / "");
  ASSERT_EQ(files.size(), 1);
  struct stat info{};
  ASSERT_EQ(stat(files[0].c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600U);
  EXPECT_EQ(info.st_size, 3 * 2 * static_cast<off_t>(kPiece)) << "all of it is reserved at once";
}

TEST(TierStore, WhatHasChangedOrIsCutOffDoesNotComeBack) {
  const Folder folder;
  TierStore store(3, 2, kPiece, folder / "");
  for (int32_t slot = 0; slot < 3; ++slot) EXPECT_TRUE(store.store(slot, 1, piece_of(slot).data()));
  const int fd = open(unnamed_files(folder / "").at(0).c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  const uint8_t flipped = piece_of(1)[100] ^ 1U;
  ASSERT_EQ(pwrite(fd, &flipped, 1, (2 * 1 + 1) * kPiece + 100), 1);
  ASSERT_EQ(ftruncate(fd, (2 * 2 + 1) * kPiece + 10), 0);
  close(fd);
  Piece bytes{};
  EXPECT_TRUE(store.load(0, 1, bytes.data()));
  EXPECT_FALSE(store.load(1, 1, bytes.data())) << "a bit has changed";
  EXPECT_FALSE(store.load(2, 1, bytes.data())) << "it ends early";
}

TEST(TierStore, WhatCannotBeWrittenIsSaid) {
  const Folder folder;
  TierStore store(3, 2, kPiece, folder / "");
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit full = {3 * kPiece + 10, before.rlim_max};  // as if the disk were
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  const bool whole = store.store(1, 0, piece_of(1).data());
  const bool cut_off = store.store(1, 1, piece_of(2).data()), none = store.store(2, 0, piece_of(3).data());
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  signal(SIGXFSZ, handler);
  EXPECT_TRUE(whole);
  EXPECT_FALSE(cut_off);
  EXPECT_FALSE(none);
  Piece bytes{};
  EXPECT_TRUE(store.load(1, 0, bytes.data()));
  EXPECT_EQ(bytes, piece_of(1));
}

TEST(TierStore, SaysWhereItCannotBe) {
  const Folder folder;
  const std::string missing = folder / "missing";
  testing::expect_in(
      testing::refusal([&] { const TierStore store(3, 2, kPiece, missing); }, TS_IO),
      {"cannot make a file in '", "missing' for evicted pages: No such file or directory: name a folder"});
  const std::string full =
      testing::refusal([&] { const TierStore store(1, 1, uint64_t{1} << 60, folder / ""); }, TS_IO);
  testing::expect_in(full, {"cannot reserve 1.0 EiB in '", "' for evicted pages: ", ": ask for less"});
}

}  // namespace
}  // namespace ts
