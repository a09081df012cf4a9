// UTF-8 to code points and back.
#pragma once
#include <string>

namespace diffpress {

// Throws UserError where `text` is not UTF-8.
std::u32string decoded_utf8(const std::string& text);
std::string encoded_utf8(const std::u32string& text, std::size_t start, std::size_t end);

}  // namespace diffpress
