// Runs the fuzz target on seeded mutations of a small plan, for compilers without libFuzzer. Every run follows from the seed and its
// number alone:
//   plan_fuzz [-runs=N] [-seconds=S] [-seed=X] [-only=RUN]     mutate
//   plan_fuzz -corpus=FOLDER                                   write a few plans for libFuzzer to begin with
//   plan_fuzz FILE...                                          try these
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>

#include "../runtime/make_plan.h"
#include "plan_fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

// So that a sanitizer's finding ends in on_abort, too.
extern "C" const char *__asan_default_options() { return "abort_on_error=1"; }  // NOLINT(bugprone-reserved-identifier)

namespace ts::fuzz {
namespace {

using testing::Bytes;
using testing::Json;
using testing::TestPlan;
using Random = std::mt19937_64;

volatile uint64_t current_seed = 0, current_run = 0;

extern "C" void on_abort(int) {
  char line[120];
  const int length =
      std::snprintf(line, sizeof(line), "\nplan_fuzz: failed; again with -seed=%llu -only=%llu\n",
                    static_cast<unsigned long long>(current_seed), static_cast<unsigned long long>(current_run));
  if (write(STDERR_FILENO, line, static_cast<size_t>(length)) < 0) _exit(2);
  _exit(1);
}

size_t below(Random &random, size_t bound) { return bound == 0 ? 0 : random() % bound; }

int64_t odd_number(Random &random) {
  constexpr std::array<int64_t, 12> kNumbers = {0,         1,         -1,  31, 32, 64, 65, INT32_MAX, int64_t{1} << 32,
                                                INT64_MAX, INT64_MIN, 4096};
  if (random() % 3 == 0) return static_cast<int64_t>(random() >> (random() % 64));
  return kNumbers[below(random, kNumbers.size())];
}

Json odd_value(Random &random) {
  switch (random() % 9) {
    case 0:
      return nullptr;
    case 1:
      return 1.5;
    case 2:
      return Json::array();
    case 3:
      return Json::object();
    case 4:
      return std::string(below(random, 300), 'x');
    case 5:
      return "table";
    case 6:
      return UINT64_MAX - below(random, 3);
    case 7:
      return Json::array({odd_number(random), odd_number(random)});
    default:
      return odd_number(random);
  }
}

/// A node of the tree, each level down less likely.
Json &pick(Json &root, Random &random) {
  Json *node = &root;
  while (node->is_structured() && !node->empty() && random() % 6 != 0) {
    node = &*std::next(node->begin(), static_cast<ptrdiff_t>(below(random, node->size())));
  }
  return *node;
}

/// One change that keeps it JSON: a value, a key, an item more or less.
void change_tree(Json &root, Random &random) {
  Json &node = pick(root, random);
  switch (random() % 5) {
    case 0:
      if (node.is_object() && !node.empty()) {
        node.erase(std::next(node.begin(), static_cast<ptrdiff_t>(below(random, node.size()))));
        return;
      }
      break;
    case 1:
      if (node.is_object()) {
        node["extra"] = odd_value(random);
        return;
      }
      break;
    case 2:
      if (node.is_array() && !node.empty()) {
        node.push_back(node[below(random, node.size())]);
        return;
      }
      break;
    case 3: {
      const Json other = pick(root, random);
      node = other;
      return;
    }
    default:
      break;
  }
  if (node.is_number_integer() && random() % 2 == 0) {
    node = static_cast<int64_t>(static_cast<uint64_t>(node.get<int64_t>()) + random() % 129 - 64);
    return;
  }
  node = odd_value(random);
}

/// One change of bytes. With `keep_size`, so that offsets elsewhere still hold.
template <class Text>
void change_bytes(Text &text, Random &random, bool keep_size) {
  if (text.empty()) return;
  const size_t at = below(random, text.size());
  const auto here = text.begin() + static_cast<ptrdiff_t>(at);
  const size_t span = 1 + below(random, std::min<size_t>(text.size() - at, 40));
  constexpr std::string_view kTokens = "{}[]\",:0123456789-e.\\u \x7F\xFF\xC0";
  switch (random() % (keep_size ? 3 : 6)) {
    case 0:
      *here ^= static_cast<char>(1U << random() % 8);
      break;
    case 1:
      *here = static_cast<typename Text::value_type>(kTokens[below(random, kTokens.size())]);
      break;
    case 2:
      std::fill_n(here, span, static_cast<typename Text::value_type>('0' + random() % 10));
      break;
    case 3:
      text.erase(here, here + static_cast<ptrdiff_t>(span));
      break;
    case 4: {
      const Text piece(here, here + static_cast<ptrdiff_t>(span));
      text.insert(text.begin() + static_cast<ptrdiff_t>(below(random, text.size())), piece.begin(), piece.end());
      break;
    }
    default:
      text.resize(at);
      break;
  }
}

/// A plan with something wrong somewhere, or nothing.
Bytes make_input(Random &random) {
  const Json mesh = Json::array({Json::array({"ep", 2}), Json::array({"tp", 2})});
  TestPlan plan = random() % 2 == 0 ? testing::test_plan() : testing::test_plan_of_ranks(mesh);
  std::string &program = plan.reserved.at("tsp/program/cpu-avx2");
  const size_t changes = 1 + below(random, 3);
  const auto change_some = [&](Json &tree) {
    for (size_t i = 0; i < changes; ++i) change_tree(tree, random);
  };
  switch (random() % 7) {
    case 0:
      plan.edit_program("cpu-avx2", change_some);
      break;
    case 1:
      plan.edit_manifest = change_some;
      break;
    case 2:
      plan.edit_header = change_some;
      break;
    case 3:
      for (size_t i = 0; i < changes; ++i) change_bytes(program, random, false);
      break;
    case 4: {
      std::string manifest = plan.manifest().dump();
      for (size_t i = 0; i < changes; ++i) change_bytes(manifest, random, false);
      return plan.bytes_with_manifest(manifest);
    }
    default: {
      Bytes bytes = plan.bytes();
      const bool keep_size = random() % 2 == 0;
      for (size_t i = 0; i < changes; ++i) change_bytes(bytes, random, keep_size);
      if (random() % 2 == 0) mend(bytes);
      return bytes;
    }
  }
  return plan.bytes();
}

int try_files(int count, char **paths) {
  for (int i = 0; i < count; ++i) {
    const std::string text = testing::read_file(paths[i]);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t *>(text.data()), text.size());
    std::printf("plan_fuzz: %s: nothing found\n", paths[i]);
  }
  return 0;
}

int write_corpus(const std::string &folder) {
  for (uint64_t i = 0; i < 64; ++i) {
    Random random(i);
    testing::write_file(folder + "/" + std::to_string(i), i == 0 ? testing::test_plan().bytes() : make_input(random));
  }
  return 0;
}

int mutate(uint64_t seed, uint64_t first, uint64_t runs, double seconds) {
  std::printf("plan_fuzz: seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) std::signal(signal, on_abort);
  current_seed = seed;
  std::array<uint64_t, static_cast<size_t>(Stage::num_stages)> reached{};
  const auto start = std::chrono::steady_clock::now();
  uint64_t run = first;
  for (; run < first + runs; ++run) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    current_run = run;
    std::seed_seq sequence{seed, seed >> 32, run, run >> 32};
    Random random(sequence);
    const Bytes bytes = make_input(random);
    ++reached[static_cast<size_t>(try_plan(bytes))];
  }
  std::printf(
      "plan_fuzz: %llu runs; refused in the header %llu, contents %llu, weights %llu, program %llu; whole %llu\n",
      static_cast<unsigned long long>(run - first), static_cast<unsigned long long>(reached[0]),
      static_cast<unsigned long long>(reached[1]), static_cast<unsigned long long>(reached[2]),
      static_cast<unsigned long long>(reached[3]), static_cast<unsigned long long>(reached[4]));
  if (run - first < 1000) return 0;
  for (const uint64_t count : reached) {
    if (count == 0) {
      std::printf("plan_fuzz: a stage was never reached: the mutations are no good\n");
      return 1;
    }
  }
  return 0;
}

}  // namespace

int run_driver(int argc, char **argv) {
  uint64_t runs = 20'000, seed = std::random_device{}(), first = 0;
  double seconds = 60;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto value = [&](std::string_view name) {
      return argument.starts_with(name) ? argv[i] + name.size() : nullptr;
    };
    if (const char *text = value("-runs=")) {
      runs = std::strtoull(text, nullptr, 10);
    } else if (const char *text = value("-seconds=")) {
      seconds = std::strtod(text, nullptr);
    } else if (const char *text = value("-seed=")) {
      seed = std::strtoull(text, nullptr, 10);
    } else if (const char *text = value("-only=")) {
      first = std::strtoull(text, nullptr, 10);
      runs = 1;
    } else if (const char *text = value("-corpus=")) {
      return write_corpus(text);
    } else {
      return try_files(argc - i, argv + i);
    }
  }
  return mutate(seed, first, runs, seconds);
}

}  // namespace ts::fuzz

int main(int argc, char **argv) { return ts::fuzz::run_driver(argc, argv); }
