// deeppcr: sequential computations evaluated in parallel. Everything public, in one include.
#pragma once

#include <deeppcr/analyse.hpp>
#include <deeppcr/array.hpp>
#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/cell.hpp>
#include <deeppcr/cells.hpp>
#include <deeppcr/check.hpp>
#include <deeppcr/dense_cells.hpp>
#include <deeppcr/dense_chain.hpp>
#include <deeppcr/enqueue.hpp>
#include <deeppcr/error.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/execution.hpp>
#include <deeppcr/group.hpp>
#include <deeppcr/recurrence.hpp>
#include <deeppcr/scalar.hpp>
#include <deeppcr/storage.hpp>
