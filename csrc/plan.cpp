#include "plan.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <map>
#include <mutex>
#include <thread>

#include "file.h"
#include "host.h"
#include "manifest.h"
#include "safetensors.h"
#include "text.h"
#include "verified.h"

namespace ts {
namespace {

constexpr std::string_view kManifest = "tsp/manifest";
constexpr std::string_view kSeal = "tsp/seal";
constexpr uint64_t kWeightAlignment = 64;
constexpr uint64_t kMaxReservedBytes = uint64_t{1} << 30;  // held in private memory

bool is_weight(const Tensor &tensor) { return !std::string_view(tensor.name).starts_with("tsp/"); }

/// Checks what makes a safetensors file a plan: its metadata, weights first and aligned, the seal last. Returns where the data after the weights begins.
uint64_t check_layout(const SafetensorsHeader &header) {
  const auto metadata = [&](const char *key) {
    const auto found = header.metadata.find(key);
    return found == header.metadata.end() ? std::string() : found->second;
  };
  if (metadata("format") != "tsp") {
    fail(TS_BAD_PLAN, "header: __metadata__.format is ", in_quotes(metadata("format")),
         ", wanted 'tsp': this safetensors file is no plan");
  }
  const std::string schema = metadata("tsp_schema");
  const bool number =
      !schema.empty() && schema.size() < 9 && std::ranges::all_of(schema, [](char c) { return c >= '0' && c <= '9'; });
  if (!number)
    fail(TS_BAD_PLAN, "header: __metadata__.tsp_schema is ", in_quotes(schema), ", wanted '", kPlanSchema, "'");
  check_schema(std::stol(schema), "header: __metadata__.tsp_schema");
  if (header.metadata.size() != 2)
    fail(TS_BAD_PLAN, "header: __metadata__ has ", header.metadata.size(), " keys, wanted 2");

  uint64_t weights_end = header.data_begin;
  for (const Tensor &tensor : header.tensors) {
    if (is_weight(tensor)) {
      if (tensor.begin != weights_end)
        fail(TS_BAD_PLAN, "header: weight ", in_quotes(tensor.name), " lies after a reserved entry");
      if (tensor.bytes() % kWeightAlignment != 0) {
        fail(TS_BAD_PLAN, "header: weight ", in_quotes(tensor.name), " is ", tensor.bytes(),
             " bytes, wanted a multiple of ", kWeightAlignment);
      }
      weights_end = tensor.end;
    } else if (tensor.dtype != "U8" || tensor.shape.size() != 1) {
      fail(TS_BAD_PLAN, "header: reserved entry ", in_quotes(tensor.name), " is ", tensor.dtype, " with ",
           tensor.shape.size(), " dims, wanted U8 with 1");
    }
  }
  return weights_end;
}

using EntryMap = std::map<std::string, Entry, std::less<>>;

/// A plan's tables, checked, with pointers into the file's bytes.
struct Contents {
  Manifest manifest;
  Digest seal{};
  EntryMap entries;
};

void check_seal(std::span<const uint8_t> file, const SafetensorsHeader &header, Contents &contents) {
  const auto last = header.tensors.empty() ? nullptr : &header.tensors.back();
  if (last == nullptr || last->name != kSeal) {
    fail(TS_BAD_PLAN, "the last entry is ", in_quotes(last == nullptr ? "" : last->name), ", wanted ",
         in_quotes(kSeal));
  }
  if (last->bytes() != contents.seal.size())
    fail(TS_BAD_PLAN, in_quotes(kSeal), " is ", last->bytes(), " bytes, wanted ", contents.seal.size());
  const auto manifest = contents.entries.find(kManifest);
  if (manifest == contents.entries.end()) fail(TS_BAD_PLAN, "the plan lacks ", in_quotes(kManifest));
  std::copy_n(file.begin() + static_cast<ptrdiff_t>(last->begin), contents.seal.size(), contents.seal.begin());
  Sha256 hash;
  hash.update(file.first(header.data_begin));
  hash.update(manifest->second.bytes);
  if (const Digest found = hash.finish(); found != contents.seal) {
    fail(TS_BAD_PLAN, "header or manifest is damaged: their SHA-256 is ", to_hex(found), ", the seal says ",
         to_hex(contents.seal));
  }
}

void check_hash(std::string_view name, std::span<const uint8_t> bytes, const Digest &wanted) {
  if (const Digest found = sha256(bytes); found != wanted) {
    fail(TS_BAD_PLAN, "entry ", in_quotes(name), " is damaged: its SHA-256 is ", to_hex(found), ", the manifest says ",
         to_hex(wanted));
  }
}

/// The manifest lists exactly the header's entries, as the header has them.
void check_entries(const SafetensorsHeader &header, const Manifest &manifest, const EntryMap &entries) {
  size_t num_listed = 0;
  for (const Tensor &tensor : header.tensors) {
    if (tensor.name == kManifest || tensor.name == kSeal) continue;
    const auto found = manifest.entries.find(tensor.name);
    if (found == manifest.entries.end())
      fail(TS_BAD_PLAN, "entry ", in_quotes(tensor.name), " is in the header, but not in the manifest");
    const ManifestEntry &listed = found->second;
    if (listed.bytes != tensor.bytes()) {
      fail(TS_BAD_PLAN, "entry ", in_quotes(tensor.name), " is ", tensor.bytes(), " bytes in the header, ",
           listed.bytes, " in the manifest");
    }
    if (listed.dtype != tensor.dtype) {
      fail(TS_BAD_PLAN, "entry ", in_quotes(tensor.name), " is ", tensor.dtype, " in the header, ",
           in_quotes(listed.dtype), " in the manifest");
    }
    if (listed.shape != tensor.shape)
      fail(TS_BAD_PLAN, "entry ", in_quotes(tensor.name), " has another shape in the manifest than in the header");
    ++num_listed;
  }
  if (num_listed == manifest.entries.size()) return;
  for (const auto &[name, listed] : manifest.entries) {
    if (!entries.contains(name))
      fail(TS_BAD_PLAN, "entry ", in_quotes(name), " is in the manifest, but not in the header");
  }
}

/// All of the checks but the weights' hashes.
Contents check_contents(std::span<const uint8_t> file, const SafetensorsHeader &header) {
  Contents contents;
  for (const Tensor &tensor : header.tensors) {
    contents.entries.emplace(tensor.name, Entry{tensor.dtype, file.subspan(tensor.begin, tensor.bytes())});
  }
  check_seal(file, header, contents);
  contents.manifest = parse_manifest(contents.entries.find(kManifest)->second.bytes);
  check_entries(header, contents.manifest, contents.entries);
  for (const auto &[name, listed] : contents.manifest.entries) {
    if (listed.kind != EntryKind::weight) check_hash(name, contents.entries.find(name)->second.bytes, listed.sha256);
  }
  return contents;
}

/// Whether a write after now would show in the file's times: they are as coarse as the file system likes, two seconds at most (FAT).
bool times_tell(const FileId &id) {
  struct timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  constexpr int64_t kCoarsest = 2'000'000'000;
  return id.ctime_ns + kCoarsest < now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

}  // namespace

struct Plan::Impl {
  std::unique_ptr<MappedFile> file;  // none over the caller's memory
  std::string path;
  Contents contents;
  ts_verify mode = TS_VERIFY_ALWAYS;
  std::mutex mutex;
  bool verified = false;

  void hash_weights(const std::vector<std::string_view> &names) const;
  void verify(const std::vector<std::string_view> &names, const Digest &key) const;
};

Plan::Plan() : impl_(std::make_unique<Impl>()) {}
Plan::~Plan() = default;

std::shared_ptr<const Plan> Plan::open(const std::string &path, ts_verify verify) {
  std::shared_ptr<Plan> plan(new Plan);
  plan->impl_->mode = verify;
  plan->impl_->path = path;
  try {
    auto file = std::make_unique<MappedFile>(path);
    const uint64_t file_bytes = file->bytes().size();
    file->freeze(0, std::min<uint64_t>(file_bytes, 8));
    const uint64_t data_begin =
        safetensors_data_begin(file->bytes().first(std::min<uint64_t>(file_bytes, 8)), file_bytes);
    file->freeze(0, data_begin);
    const SafetensorsHeader header = parse_safetensors(file->bytes(), file_bytes);
    const uint64_t weights_end = check_layout(header);
    if (file_bytes - weights_end > kMaxReservedBytes) {
      fail(TS_BAD_PLAN, "the entries beside the weights are ", file_bytes - weights_end, " bytes, at most ",
           kMaxReservedBytes);
    }
    file->freeze(weights_end, file_bytes);
    plan->impl_->contents = check_contents(file->bytes(), header);
    plan->impl_->file = std::move(file);
  } catch (const Error &e) {
    fail(e.status(), in_quotes(path), ": ", e.what());
  }
  return plan;
}

std::shared_ptr<const Plan> Plan::from_memory(std::span<const uint8_t> bytes) {
  const SafetensorsHeader header = parse_safetensors(bytes, bytes.size());
  check_layout(header);
  std::shared_ptr<Plan> plan(new Plan);
  plan->impl_->contents = check_contents(bytes, header);
  return plan;
}

const Entry *Plan::find(std::string_view name) const {
  const auto found = impl_->contents.entries.find(name);
  return found == impl_->contents.entries.end() ? nullptr : &found->second;
}

std::vector<std::string> Plan::targets() const { return impl_->contents.manifest.targets; }
const Mesh &Plan::mesh() const { return impl_->contents.manifest.mesh; }
const ModelInfo &Plan::model() const { return impl_->contents.manifest.model; }

/// Hashes weights on several threads, an entry a time, the largest first.
void Plan::Impl::hash_weights(const std::vector<std::string_view> &names) const {
  struct Work {
    std::string_view name;
    std::span<const uint8_t> bytes;
    const Digest *wanted;
  };
  std::vector<Work> work;
  work.reserve(names.size());
  for (const std::string_view name : names) {
    work.push_back(
        {name, contents.entries.find(name)->second.bytes, &contents.manifest.entries.find(name)->second.sha256});
  }
  std::ranges::sort(work, std::greater{}, [](const Work &w) { return w.bytes.size(); });
  std::atomic<size_t> next = 0;
  std::vector<std::exception_ptr> failures(work.size());
  const auto hash_some = [&] {
    for (size_t i = next++; i < work.size(); i = next++) {
      try {
        check_hash(work[i].name, work[i].bytes, *work[i].wanted);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    }
  };
  std::vector<std::jthread> helpers;
  const size_t num_helpers = std::min<size_t>(usable_cores(), work.size());
  try {
    for (size_t i = 1; i < num_helpers; ++i) helpers.emplace_back(hash_some);
  } catch (const std::system_error &) {
    // No more threads to be had: those that there are do it.
  }
  hash_some();
  helpers.clear();  // joins
  for (const std::exception_ptr &failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

/// Hashes the weights `names`, unless they were found right before under `key`.
void Plan::Impl::verify(const std::vector<std::string_view> &names, const Digest &key) const {
  const VerifiedFiles memory;
  try {
    const bool remembered = file != nullptr && mode == TS_VERIFY_AUTO && memory.contains(file->id(), key);
    const bool tells = file != nullptr && times_tell(file->id());
    if (!remembered) hash_weights(names);
    if (file != nullptr && file->id_now() != file->id()) {
      fail(TS_BAD_PLAN, "the file was written to while it was read: open it again");
    }
    if (!remembered && tells) memory.remember(file->id(), key);
  } catch (const Error &e) {
    if (file == nullptr) throw;
    fail(e.status(), in_quotes(path), ": ", e.what());
  }
}

void Plan::verify_weights() const {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->verified) return;
  std::vector<std::string_view> names;
  for (const auto &[name, listed] : impl_->contents.manifest.entries) {
    if (listed.kind == EntryKind::weight) names.emplace_back(name);
  }
  impl_->verify(names, impl_->contents.seal);
  impl_->verified = true;
}

void Plan::verify_weights(const std::vector<std::string_view> &names, std::string_view whose) const {
  Sha256 key;
  key.update(impl_->contents.seal);
  key.update({reinterpret_cast<const uint8_t *>(whose.data()), whose.size()});
  impl_->verify(names, key.finish());
}

const Digest &Plan::seal() const { return impl_->contents.seal; }

}  // namespace ts
