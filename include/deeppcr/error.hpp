// What goes wrong, as types: misuse is an exception, non-convergence is a Status (see evaluate.hpp).
#pragma once

#include <stdexcept>
#include <string>

namespace deeppcr {

/// Base of every exception that deeppcr throws on purpose.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// An argument that cannot be used. The message names the argument, what was expected and what came.
struct InvalidArgument : Error {
    InvalidArgument(const std::string& argument, const std::string& expected, const std::string& actual)
        : Error(argument + ": expected " + expected + ", got " + actual) {}
};

/// Memory that a call would need and that cannot be had; raised before anything is allocated or changed.
struct OutOfMemory : Error {
    using Error::Error;
};

/// A GPU, or something that the GPU must be able to do, that a call would need and that is not there.
struct NoDevice : Error {
    using Error::Error;
};

/// A trajectory that did not converge, raised only under `OnFailure::raise`.
struct NotConverged : Error {
    using Error::Error;
};

}  // namespace deeppcr
