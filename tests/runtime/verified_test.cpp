#include "verified.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "expect.h"
#include "make_plan.h"
#include "plan.h"

namespace ts {
namespace {

using namespace ts::testing;  // NOLINT(google-build-using-namespace): helpers of these tests

const FileId kFile = {1, 2, 3, 4, 5};
const Digest kSeal = sha256(as_bytes("seal"));

TEST(VerifiedFiles, RemembersExactlyThatFile) {
  const Folder folder;
  const VerifiedFiles memory(folder / "a/b/tsruntime");
  EXPECT_FALSE(memory.contains(kFile, kSeal));
  memory.remember(kFile, kSeal);
  EXPECT_TRUE(memory.contains(kFile, kSeal));
  EXPECT_TRUE(VerifiedFiles(folder / "a/b/tsruntime").contains(kFile, kSeal));
  EXPECT_FALSE(memory.contains(kFile, sha256(as_bytes("another"))));
  for (const FileId &other : {FileId{9, 2, 3, 4, 5}, FileId{1, 9, 3, 4, 5}, FileId{1, 2, 9, 4, 5},
                              FileId{1, 2, 3, 9, 5}, FileId{1, 2, 3, 4, 9}}) {
    EXPECT_FALSE(memory.contains(other, kSeal));
  }
  struct stat info{};
  ASSERT_EQ(stat((folder / "a/b/tsruntime").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700U);
  ASSERT_EQ(stat((folder / "a/b/tsruntime/verified").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600U);
}

TEST(VerifiedFiles, KeepsTheLastFew) {
  const Folder folder;
  const VerifiedFiles memory(folder / "c");
  for (uint64_t i = 0; i < 200; ++i) memory.remember({1, i, 3, 4, 5}, kSeal);
  for (uint64_t i = 0; i < 200; ++i) EXPECT_EQ(memory.contains({1, i, 3, 4, 5}, kSeal), i >= 136) << i;
  memory.remember({1, 199, 3, 4, 6}, kSeal);  // the same file, later
  EXPECT_FALSE(memory.contains({1, 199, 3, 4, 5}, kSeal));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder / "c"), {}), 1);  // no temporary files are left
}

TEST(VerifiedFiles, TrustsNothingStrange) {
  const Folder folder;
  VerifiedFiles("").remember(kFile, kSeal);
  EXPECT_FALSE(VerifiedFiles("").contains(kFile, kSeal));
  VerifiedFiles("/proc/nowhere").remember(kFile, kSeal);
  EXPECT_FALSE(VerifiedFiles("/proc/nowhere").contains(kFile, kSeal));

  const VerifiedFiles memory(folder / "c");
  memory.remember(kFile, kSeal);
  const std::string path = folder / "c/verified";
  chmod(path.c_str(), 0666);
  EXPECT_FALSE(memory.contains(kFile, kSeal));
  chmod(path.c_str(), 0600);
  EXPECT_TRUE(memory.contains(kFile, kSeal));
  chmod((folder / "c").c_str(), 0777);
  EXPECT_FALSE(memory.contains(kFile, kSeal));
  chmod((folder / "c").c_str(), 0700);
  std::filesystem::rename(path, folder / "elsewhere");
  std::filesystem::create_symlink(folder / "elsewhere", path);
  EXPECT_FALSE(memory.contains(kFile, kSeal));
  std::filesystem::remove(path);
  std::ofstream(path) << std::string(200'000, 'x');
  EXPECT_FALSE(memory.contains(kFile, kSeal));
  memory.remember(kFile, kSeal);  // mends it
  EXPECT_TRUE(memory.contains(kFile, kSeal));
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  memory.remember(kFile, kSeal);
  EXPECT_FALSE(memory.contains(kFile, kSeal));
}

/// Opens the plan and verifies it: the message, empty if all is well.
std::string verify(const std::string &path, ts_verify mode) {
  try {
    Plan::open(path, mode)->verify_weights();
  } catch (const Error &e) {
    return e.what();
  }
  return {};
}

/// Makes the file's times look as if it had been written a minute ago; the change time follows the clock, so that waits.
void age() { std::this_thread::sleep_for(std::chrono::milliseconds(2100)); }

// A remembered plan is not hashed again; how else could damage to its weights pass?
TEST(VerifiedFiles, SaveTheSecondHash) {
  const Folder folder;
  const std::string path = folder / "plan.tsp";
  const Bytes whole = test_plan().bytes();
  write_file(path, whole);
  EXPECT_EQ(verify(path, TS_VERIFY_AUTO), "");
  EXPECT_FALSE(std::filesystem::exists(folder / "cache/tsruntime/verified"))
      << "a file written just now may be written again unseen";
  age();
  EXPECT_EQ(verify(path, TS_VERIFY_AUTO), "");
  EXPECT_TRUE(std::filesystem::exists(folder / "cache/tsruntime/verified"));

  // Damage as no file system makes it: the same times. A plan of the same seal at the same inode, put there by writing the
  // memory of the wrong file.
  Bytes damaged = whole;
  damaged[8 + damaged[0] + 256U * damaged[1] + 5] ^= 1;
  const std::string other = folder / "damaged.tsp";
  write_file(other, damaged);
  expect_in(verify(other, TS_VERIFY_AUTO), {"'table' is damaged"});
  struct stat info{};
  ASSERT_EQ(stat(other.c_str(), &info), 0);
  const auto ns = [](const struct timespec &t) { return t.tv_sec * 1'000'000'000LL + t.tv_nsec; };
  const FileId id = {info.st_dev, info.st_ino, static_cast<uint64_t>(info.st_size), ns(info.st_mtim), ns(info.st_ctim)};
  Digest seal;
  std::copy(whole.end() - 32, whole.end(), seal.begin());
  VerifiedFiles().remember(id, seal);
  EXPECT_EQ(verify(other, TS_VERIFY_AUTO), "");
  expect_in(verify(other, TS_VERIFY_ALWAYS), {"'table' is damaged"});
}

TEST(VerifiedFiles, AChangedFileIsHashed) {
  const Folder folder;
  const std::string path = folder / "plan.tsp";
  write_file(path, test_plan().bytes());
  age();
  EXPECT_EQ(verify(path, TS_VERIFY_AUTO), "");
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(8 + 4096);
    file.seekg(0);
    const int low = file.get(), middle = file.get();
    file.seekp(8 + low + 256 * middle + 5);
    file.put('\x5A');
  }
  expect_in(verify(path, TS_VERIFY_AUTO), {"'table' is damaged"});
}

TEST(VerifiedFiles, NoHomeIsNoError) {
  const Folder folder;
  write_file(folder / "plan.tsp", test_plan().bytes());
  age();
  unsetenv("XDG_CACHE_HOME");
  const std::string home = std::getenv("HOME") != nullptr ? std::getenv("HOME") : "";
  unsetenv("HOME");
  EXPECT_EQ(verify(folder / "plan.tsp", TS_VERIFY_AUTO), "");
  setenv("HOME", (folder / "plan.tsp").c_str(), 1);  // a file where a folder should be
  EXPECT_EQ(verify(folder / "plan.tsp", TS_VERIFY_AUTO), "");
  setenv("HOME", home.c_str(), 1);
}

}  // namespace
}  // namespace ts
