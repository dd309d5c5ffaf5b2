#pragma once

#include <stdexcept>
#include <string>

#include "engine.h"

namespace ts {

/// What crosses the C ABI as a status and a message. Thrown inside the engine, caught in engine_abi.cpp only.
class Error : public std::runtime_error {
 public:
  Error(ts_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
  ts_status status() const { return status_; }

 private:
  ts_status status_;
};

}  // namespace ts
