#include "recording.h"

#include <algorithm>
#include <bit>

#include "text.h"

namespace ts {
namespace {

constexpr int32_t kVersion = 2;

/// The options that decide the schedule.
constexpr std::array kScheduling = {
    &ts_engine_options::num_pages,   &ts_engine_options::token_budget,   &ts_engine_options::max_seqs,
    &ts_engine_options::max_queue,   &ts_engine_options::prefix_cache,   &ts_engine_options::max_draft,
    &ts_engine_options::patience_ms, &ts_engine_options::target_tpot_us, &ts_engine_options::overlap_schedule};

std::span<const uint8_t> bytes_of(const void *data, int32_t size) {
  return {static_cast<const uint8_t *>(data), static_cast<size_t>(size)};
}

std::string_view text_of(const Digest &digest) {
  return {reinterpret_cast<const char *>(digest.data()), digest.size()};
}

/// A request and what it points to.
struct OwnedRequest {
  ts_request request{};
  std::vector<ts_logit_bias> bias;
  std::string salt;
};

/// Takes apart what record_of(request) put together. It points into the record too.
int64_t read_request(WordReader words, OwnedRequest &to) {
  ts_request &r = to.request;
  r.size = sizeof(r);
  const int64_t at_ms = words.take_long();
  r.id = words.take_unsigned();
  r.seed = words.take_unsigned();
  r.session = words.take_unsigned();
  r.tenant = words.take_unsigned();
  for (int32_t *field :
       {&r.max_tokens, &r.top_k, &r.ignore_eos, &r.num_logprobs, &r.lease_ms, &r.priority, &r.timeout_ms}) {
    *field = words.take();
  }
  for (float *field :
       {&r.temperature, &r.top_p, &r.min_p, &r.repetition_penalty, &r.presence_penalty, &r.frequency_penalty}) {
    *field = words.take_float();
  }
  r.num_logit_bias = words.take();
  for (int32_t i = 0; i < r.num_logit_bias; ++i) {
    const int32_t token = words.take();
    to.bias.push_back({token, words.take_float()});
  }
  r.logit_bias = to.bias.data();
  to.salt = words.take_bytes();
  r.cache_salt = to.salt.data();
  r.num_cache_salt = static_cast<int32_t>(to.salt.size());
  const std::span<const int32_t> stop = words.take_ints();
  r.stop_tokens = stop.data();
  r.num_stop_tokens = static_cast<int32_t>(stop.size());
  const std::span<const int32_t> prompt = words.take_ints();
  r.prompt = prompt.data();
  r.num_prompt = static_cast<int32_t>(prompt.size());
  return at_ms;
}

}  // namespace

Words record_of(const ts_request &r, int64_t at_ms) {
  Words words;
  words.put_long(at_ms).put_unsigned(r.id).put_unsigned(r.seed).put_unsigned(r.session).put_unsigned(r.tenant);
  for (const int32_t field :
       {r.max_tokens, r.top_k, r.ignore_eos, r.num_logprobs, r.lease_ms, r.priority, r.timeout_ms}) {
    words.put(field);
  }
  for (const float field :
       {r.temperature, r.top_p, r.min_p, r.repetition_penalty, r.presence_penalty, r.frequency_penalty}) {
    words.put_float(field);
  }
  words.put(r.num_logit_bias);
  for (int32_t i = 0; i < r.num_logit_bias; ++i) words.put(r.logit_bias[i].token).put_float(r.logit_bias[i].bias);
  const Digest salt = sha256(bytes_of(r.cache_salt, r.num_cache_salt));
  words.put_bytes(r.num_cache_salt > 0 ? text_of(salt) : std::string_view());
  words.put_ints({r.stop_tokens, static_cast<size_t>(r.num_stop_tokens)});
  words.put_ints({r.prompt, static_cast<size_t>(r.num_prompt)});
  return words;
}

Words record_of(const TraceHeader &header) {
  Words words;
  words.put(kVersion).put_bytes(text_of(header.plan)).put_bytes(header.target);
  words.put(static_cast<int32_t>(kScheduling.size()));
  for (const auto option : kScheduling) words.put(header.options.*option);
  words.put_long(header.options.offload_bytes);
  return words;
}

TraceHeader read_header(TraceReader &reader, const Digest &plan) {
  if (!reader.next() || reader.kind() != TraceRecord::header) {
    fail(TS_BAD_REQUEST, in_quotes(reader.path()), " is no trace: it does not begin as one");
  }
  WordReader words(reader.words());
  if (const int32_t version = words.take(); version != kVersion) {
    fail(TS_BAD_REQUEST, in_quotes(reader.path()), " is a trace of format ", version, ", this engine reads ", kVersion,
         ": replay it with the engine that wrote it");
  }
  TraceHeader header;
  if (const std::string seal = words.take_bytes(); seal != text_of(plan)) {
    Digest other{};
    std::copy_n(seal.begin(), std::min(seal.size(), other.size()), other.begin());
    fail(TS_BAD_REQUEST, in_quotes(reader.path()), " was recorded with another plan (its seal is ", to_hex(other),
         ", this one's ", to_hex(plan), "): replay it with that");
  }
  header.plan = plan;
  header.target = words.take_bytes();
  if (const int32_t count = words.take(); count != static_cast<int32_t>(kScheduling.size())) {
    fail(TS_BAD_REQUEST, in_quotes(reader.path()), " has ", count, " options, this engine ", kScheduling.size(),
         ": replay it with the engine that wrote it");
  }
  for (const auto option : kScheduling) header.options.*option = words.take();
  header.options.offload_bytes = words.take_long();
  return header;
}

void TraceHeader::put_into(ts_engine_options &to) const {
  for (const auto option : kScheduling) to.*option = options.*option;
  to.offload_bytes = options.offload_bytes;
}

BatchRecord record_of(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups) {
  const ts_batch &b = batch.arrays();
  const auto tokens = static_cast<size_t>(b.num_tokens), seqs = static_cast<size_t>(b.num_seqs);
  Checksum rows, ids, pages, copies;
  rows.add({b.query_start, seqs + 1});
  rows.add({b.context_len, seqs});
  rows.add({b.positions, tokens});
  rows.add({b.logit_rows, static_cast<size_t>(b.num_logits)});
  ids.add({b.token_ids, tokens});
  pages.add({b.slots, static_cast<size_t>(num_groups) * tokens});
  const int32_t width = b.page_table_stride / num_groups;
  for (int32_t i = 0; i < b.num_seqs * num_groups; ++i) {  // a group's part of a row each
    const int32_t num_pages = std::min(std::max(num_pages_for(b.context_len[i / num_groups], page_size), 2), width);
    pages.add({b.page_table + static_cast<ptrdiff_t>(i) * width, static_cast<size_t>(num_pages)});
  }
  for (const PageCopy &copy : batch.copies()) {
    copies.add(std::array{copy.page, copy.slot, static_cast<int32_t>(copy.to)});
  }
  const auto halves = [](uint64_t x) { return std::bit_cast<std::array<int32_t, 2>>(x); };
  const auto n = halves(step), r = halves(rows.sum().head), i = halves(ids.sum().head), p = halves(pages.sum().head),
             c = halves(copies.sum().head);
  const auto num_copies = static_cast<int32_t>(batch.copies().size());
  return {n[0], n[1], b.num_seqs, b.num_tokens, b.num_logits, r[0], r[1],
          i[0], i[1], p[0],       p[1],         num_copies,   c[0], c[1]};
}

// ---- writing --------------------------------------------------------------------------------------------------------

Recorder::Recorder(const std::string &path, const TraceHeader &header) : writer_(path) {
  writer_.add(TraceRecord::header, record_of(header).words());
  writer_.flush();
}

void Recorder::taken(Turn &turn) {
  for (Message &message : turn.messages) {
    if (auto *submitted = std::get_if<Submitted>(&message)) {
      writer_.add(TraceRecord::submit, submitted->record.words());
      submitted->record = {};
    } else {
      words_.clear();
      writer_.add(TraceRecord::cancel, words_.put_unsigned(std::get<Cancelled>(message).id).words());
    }
  }
  words_.clear();
  words_.put_long(turn.now_ms).put(turn.closing ? 1 : 0).put_bytes(turn.failure);
  writer_.add(TraceRecord::turn, words_.words());
}

void Recorder::batch(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups) {
  writer_.add(TraceRecord::batch, record_of(step, batch, page_size, num_groups));
  flush();
}

void Recorder::result(int64_t took_ns, std::span<const Outcome> outcomes, std::span<const PageCopy> copies) {
  words_.clear();
  words_.put(0).put_long(took_ns).put(static_cast<int32_t>(outcomes.size()));
  for (const Outcome &outcome : outcomes) words_.put(outcome.token);
  const auto failed = [](const PageCopy &copy) { return copy.state == PageCopy::State::failed; };
  words_.put(static_cast<int32_t>(std::ranges::count_if(copies, failed)));
  for (size_t i = 0; i < copies.size(); ++i) {
    if (failed(copies[i])) words_.put(static_cast<int32_t>(i));
  }
  writer_.add(TraceRecord::result, words_.words());
}

void Recorder::failed(const std::string &message) {
  words_.clear();
  writer_.add(TraceRecord::result, words_.put(1).put_long(0).put_bytes(message).words());
}

void Recorder::restarted(const std::string &message) {
  words_.clear();
  writer_.add(TraceRecord::restart, words_.put_bytes(message).words());
  flush();
}

// ---- replaying ------------------------------------------------------------------------------------------------------

void Replay::take(Turn &turn, const RequestLimits &limits) {
  turn.messages.clear();
  turn.failure.clear();
  turn.closing = !more_;
  bool whole = false;
  while (more_ && !whole && reader_->kind() != TraceRecord::restart) {  // a turn may have failed in the middle
    WordReader words(reader_->words());
    if (reader_->kind() == TraceRecord::submit) {
      OwnedRequest owned;
      const int64_t at_ms = read_request(words, owned);
      turn.messages.emplace_back(Submitted{make_sequence(owned.request, limits), at_ms});
      ++num_requests_;
    } else if (reader_->kind() == TraceRecord::cancel) {
      turn.messages.emplace_back(Cancelled{words.take_unsigned()});
    } else if (reader_->kind() == TraceRecord::turn) {
      now_ms_ = words.take_long();
      turn.closing = words.take() != 0;
      turn.failure = words.take_bytes();
      whole = true;
    } else {
      fail(TS_BAD_REQUEST, in_quotes(reader_->path()), " is damaged: a step does not follow its turn");
    }
    more_ = reader_->next();
  }
  turn.now_ms = now_ms_;
  if (!whole && !more_) turn.messages.clear();  // the trace ends in it
  take_outcome();
}

/// Reads ahead what the turn has come to.
void Replay::take_outcome() {
  batch_.reset();
  failed_.reset();
  restart_.reset();
  has_result_ = false;
  failed_copies_.clear();
  took_ns_ = 0;
  for (; more_; more_ = reader_->next()) {
    WordReader words(reader_->words());
    if (reader_->kind() == TraceRecord::batch) {
      batch_.emplace();
      for (int32_t &word : *batch_) word = words.take();
    } else if (reader_->kind() == TraceRecord::result) {
      const bool failed = words.take() != 0;
      took_ns_ = words.take_long();
      if (failed) {
        failed_ = words.take_bytes();
      } else {
        const std::span<const int32_t> tokens = words.take_ints();
        tokens_.assign(tokens.begin(), tokens.end());
        const std::span<const int32_t> copies = words.take_ints();
        failed_copies_.assign(copies.begin(), copies.end());
      }
      has_result_ = true;
    } else if (reader_->kind() == TraceRecord::restart) {
      restart_ = words.take_bytes();
    } else {
      return;
    }
  }
}

std::string Replay::compare(uint64_t step, const Batch &batch, int32_t page_size, int32_t num_groups) const {
  const std::string where = "step " + std::to_string(step) + " differs: ";
  if (!batch_) return more_ ? where + "the trace has none here" : "";
  const BatchRecord mine = record_of(step, batch, page_size, num_groups);
  const auto count = [&](size_t at, const char *name) {
    return where + "the trace has " + std::to_string((*batch_)[at]) + name + ", this run " + std::to_string(mine[at]);
  };
  if ((*batch_)[0] != mine[0] || (*batch_)[1] != mine[1]) return count(0, " for its number");
  if ((*batch_)[2] != mine[2]) return count(2, " sequences");
  if ((*batch_)[3] != mine[3]) return count(3, " tokens");
  if ((*batch_)[4] != mine[4]) return count(4, " rows of logits");
  if ((*batch_)[11] != mine[11]) return count(11, " copies to and from the second tier");
  constexpr std::array kParts = {std::pair{5, "which rows have which positions"}, std::pair{7, "the rows' token ids"},
                                 std::pair{9, "the rows' pages"},
                                 std::pair{12, "which pages go to and from the second tier"}};
  for (const auto &[first, what] : kParts) {
    const auto at = static_cast<size_t>(first);
    if ((*batch_)[at] == mine[at] && (*batch_)[at + 1] == mine[at + 1]) continue;
    return where + what + " are not the same";
  }
  return {};
}

std::string Replay::repeat(std::span<PageCopy> copies) const {
  auto next = failed_copies_.begin();
  for (size_t i = 0; i < copies.size(); ++i) {
    const bool failed = next != failed_copies_.end() && static_cast<size_t>(*next) == i;
    if (failed) {
      ++next;
    } else if (copies[i].state == PageCopy::State::failed && has_result_) {
      return std::string("a page could not be ") +
             (copies[i].to == PageCopy::To::slot ? "kept in" : "brought back from") +
             " the second tier, as it was in the trace";
    }
    if (failed) copies[i].state = PageCopy::State::failed;
  }
  return {};
}

std::string Replay::compare(const Batch &batch, std::span<const Outcome> outcomes) {
  if (!has_result_) return {};  // the trace ends with this step
  if (tokens_.size() != outcomes.size()) return "the trace's last step has another number of outcomes";
  for (size_t i = 0; i < outcomes.size(); ++i) {
    const int32_t mine = outcomes[i].token;
    num_output_tokens_ += mine >= 0 ? 1 : 0;
    if (mine == tokens_[i]) continue;
    const Sequence &sequence = batch.sequence(static_cast<int32_t>(i));
    const auto token = [](int32_t t) { return t < 0 ? std::string("none") : std::to_string(t); };
    return "output token " + std::to_string(sequence.num_outputs() + batch.ahead(static_cast<int32_t>(i))) +
           " of request " + std::to_string(sequence.id) + " differs: it was " + token(tokens_[i]) + " and is " +
           token(mine);
  }
  return {};
}

}  // namespace ts
