// What the tests of errors share.
#pragma once

#include <string>

#include <deeppcr/error.hpp>

namespace deeppcr {

inline const std::string nothing_thrown = "nothing was thrown";

/// The message of the Exception that `call` throws; what is not one passes through.
template <class Exception = InvalidArgument, class Call>
std::string message_of(const Call& call) {
    try {
        call();
    } catch (const Exception& error) {
        return error.what();
    }
    return nothing_thrown;
}

}  // namespace deeppcr
