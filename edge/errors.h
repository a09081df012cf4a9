// What can be wrong with what the user gave us: one sentence, and exit status 2.
#pragma once
#include <stdexcept>
#include <string>

namespace diffpress {

struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace diffpress
