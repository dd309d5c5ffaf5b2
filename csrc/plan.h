#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"
#include "mesh.h"
#include "sha256.h"

namespace ts {

/// The model facts that serving needs, from the manifest's "model".
struct ModelInfo {
  std::string name;
  int32_t vocab_size = 0;
  int32_t max_context = 0;
  std::vector<int32_t> eos_token_ids;
};

/// One entry of a plan.
struct Entry {
  std::string_view dtype;          ///< safetensors' word: "BF16", "F32", "U8", ...
  std::span<const uint8_t> bytes;  ///< in the mapped file
};

/// A mapped, validated plan.tsp. Immutable; the file is never written.
class Plan {
 public:
  /// Maps and checks everything but the weights' hashes. Throws Error (TS_BAD_PLAN, TS_IO).
  static std::shared_ptr<const Plan> open(const std::string &path, ts_verify verify);

  /// The same over bytes that the caller keeps alive and unchanged, on a 64-byte boundary. Weights are always hashed.
  static std::shared_ptr<const Plan> from_memory(std::span<const uint8_t> bytes);

  ~Plan();
  Plan(const Plan &) = delete;
  Plan &operator=(const Plan &) = delete;

  const Entry *find(std::string_view name) const;  ///< nullptr if there is none
  std::vector<std::string> targets() const;        ///< as the manifest lists them
  const ModelInfo &model() const;
  const Mesh &mesh() const;  ///< of the ranks that run it together

  /// Hashes every weight entry, unless the verify mode is auto and this very file (device, inode, size, times) was verified
  /// before by this user on this machine. Remembers success. Throws Error (TS_BAD_PLAN) naming the entry and both hashes.
  void verify_weights() const;

  /// The same for the entries `names` alone: those that one rank reads. `whose` tells such sets of one plan apart.
  void verify_weights(const std::vector<std::string_view> &names, std::string_view whose) const;

  const Digest &seal() const;  ///< what tells this plan from all others

 private:
  Plan();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ts
