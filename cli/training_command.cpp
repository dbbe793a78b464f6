#include "training_command.hpp"

#include <files/error.hpp>

namespace deeppcr::program {

void TrainingFiles::add_options(CLI::App& command, const std::string& name, const std::string& logged) {
    name_ = name;
    command.add_option("--resume", resume_,
                       "Continue this checkpoint, or the one before where it is not whole, with its options");
    command.add_option("--checkpoint", checkpoint_,
                       "Where the training is saved (default: --resume's, else " + name + ".safetensors)");
    command.add_flag("--overwrite", overwrite_, "Replace a checkpoint that exists");
    command.add_option("--log", log_, "Append a JSON object per " + logged + " to this file");
}

void TrainingFiles::check() const {
    std::error_code error;
    if (std::filesystem::exists(checkpoint(), error) && !overwrite_ &&
        !(std::filesystem::equivalent(checkpoint(), resume_, error) && !error))
        throw FileError(checkpoint(),
                        "exists: continue it with --resume, name another with --checkpoint, or give --overwrite");
}

std::filesystem::path TrainingFiles::checkpoint() const {
    return !checkpoint_.empty() ? checkpoint_ : !resume_.empty() ? resume_ : name_ + ".safetensors";
}

Log::Log(const TrainingFiles& files, const Output& output) : path_(output.follows() ? "" : files.log()) {
    if (path_.empty()) return;
    file_.open(path_, std::ios::app);
    if (!file_) throw FileError(path_, "cannot be opened for writing");
}

void Log::write(const Json& object) {
    if (path_.empty()) return;
    file_ << object.dump() << std::endl;
    if (!file_) throw FileError(path_, "cannot be written to");
}

void TrainingProgress::show(const std::string& title, double done, double total, const std::string& note,
                            double before) {
    if (!bar_ || title_ != title) {
        bar_.reset();
        bar_.emplace(title, total - before);
        title_ = title;
        before_ = before;
    }
    bar_->update(done - before_, note);
}

void TrainingProgress::line(const std::string& text) {
    end();
    output_.line(text);
}

void TrainingProgress::warn(const std::string& text) {
    end();
    output_.warn(text);
}

}  // namespace deeppcr::program
