// Expectations on errors, and a folder that goes with its test.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "error.h"

namespace ts::testing {

/// The message of the Error that body() throws; the test fails if it throws none, or one of another status.
template <class Body>
std::string refusal(Body &&body, ts_status status = TS_BAD_PLAN) {
  try {
    body();
  } catch (const Error &e) {
    EXPECT_EQ(e.status(), status) << e.what();
    EXPECT_STRNE(e.what(), "");
    return e.what();
  }
  ADD_FAILURE() << "nothing was refused";
  return {};
}

inline void expect_in(const std::string &message, std::initializer_list<const char *> parts) {
  for (const char *part : parts) EXPECT_NE(message.find(part), std::string::npos) << part << "\nis not in: " << message;
}

/// A fresh folder, which is also the user's cache folder.
class Folder {
 public:
  Folder() {
    std::string name = ::testing::TempDir() + "/tsruntime-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    path_ = name;
    setenv("XDG_CACHE_HOME", (name + "/cache").c_str(), 1);
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder &) = delete;
  Folder &operator=(const Folder &) = delete;

  std::string operator/(const std::string &name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace ts::testing
