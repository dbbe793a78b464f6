// What the processes of a training tell each other: sums and means of tensors over the ranks of a Group.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>
#include <vector>

#include <deeppcr/group.hpp>

namespace deeppcr::nn {

/// Each tensor becomes its sum over the ranks, the same bits on all of them: in the order of Group::sum, which depends
/// on their number and on how many values there are together. All values of a type on a device are sent as one array,
/// between GPUs by NCCL where Group::sum does. Collective; shapes and types are the same on all ranks. Throws
/// InvalidArgument where one is neither float nor double.
void sum_over(Group& group, const std::vector<at::Tensor>& tensors);

/// The part in a training of one of the processes that train together; of the only one where there is no group.
class Share {
public:
    /// group: null for a process alone; it outlives the share.
    explicit Share(Group* group) : group_(group != nullptr && group->size() > 1 ? group : nullptr) {}

    /// Null where this process is alone.
    Group* group() const { return group_; }
    index ranks() const { return group_ != nullptr ? group_->size() : 1; }
    /// Whether this process prints, logs and writes.
    bool speaks() const { return group_ == nullptr || group_->rank() == 0; }
    /// This process's [first,last) of `count` things.
    std::pair<index, index> part(index count) const {
        return group_ != nullptr ? group_->part(count) : std::pair<index, index>(0, count);
    }

    // The rest is collective.
    double sum(double value) const;
    /// Whether one has it.
    bool any(bool condition) const;
    /// Sums and maxima over the ranks, in place; a maximum is NaN where one is.
    void reduce(std::vector<double>& sums, std::vector<double>& maxima) const;
    void barrier() const;

private:
    Group* group_;
};

}  // namespace deeppcr::nn
