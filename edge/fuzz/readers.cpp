// What the runner reads from a bundle, given any bytes: it may refuse them and must do nothing else. For libFuzzer, and for driver.cpp.
#include <cstddef>
#include <cstdint>
#include <string>

#include "../errors.h"
#include "../image_files.h"
#include "../manifest.h"
#include "../tokenizer.h"

namespace {

const char* const kText = "It's A caf\xc3\xa9, e\xcc\x81 1234 <|startoftext|> \xed\x95\x9c!!";

// The first byte says which reader.
void read(const std::string& given) {
  using namespace diffpress;
  const std::string bytes = given.substr(1);
  switch (given[0]) {
    case 'b': parse_bundle(bytes); break;
    case 'e': parse_export(bytes); break;
    case 'i': parse_npy(bytes); break;
    case 't': {
      const Tokenizer tokenizer(bytes);
      tokenizer.encode(kText);
      break;
    }
  }
}

}  // namespace

// Whether these bytes are what a bundle may hold.
bool accepted(const std::string& bytes) {
  try {
    read(bytes);
  } catch (const diffpress::UserError&) {
    return false;
  }
  return true;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t count) {
  if (count > 0) accepted(std::string(reinterpret_cast<const char*>(bytes), count));
  return 0;
}
