// The command line.
#pragma once
#include <string>

#include "pipeline.h"

namespace diffpress {

struct Options {
  std::optional<std::string> prompt, label, out;
  Wanted wanted;
  int threads = 0;
  bool bench = false, self_test = false, help = false;
};

extern const char* const kHelp;

// Throws UserError where the command line is wrong.
Options parse_options(int count, char** arguments);

}  // namespace diffpress
