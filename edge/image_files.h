// Images as files: PNG out, numpy's in.
#pragma once
#include <string>

#include "pipeline.h"

namespace diffpress {

// The bytes of an 8-bit PNG, grey where there is one channel.
std::string png_of(const Image& image);

// An image [H, W, C] in float32. Throws UserError where the bytes are no such array.
Image parse_npy(const std::string& bytes);

}  // namespace diffpress
