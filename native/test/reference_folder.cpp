#include "reference_folder.h"

#include <cmath>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace lora_da::test {

namespace {

using Json = nlohmann::json;

std::vector<ReferenceRow> readRows(const std::string& path) {
  std::ifstream file(path);
  std::vector<ReferenceRow> rows;
  for (std::string line; std::getline(file, line);) {
    const Json row = Json::parse(line);
    rows.push_back({row.at("input_ids").get<std::vector<int32_t>>(), row.at("labels").get<std::vector<int32_t>>()});
  }
  return rows;
}

ReferenceStart readStart(const std::string& label, const Json& entry) {
  ReferenceStart start;
  start.label = label;
  start.rank = entry.at("rank").get<int64_t>();
  start.mask = entry.at("tokenMask").get<std::string>() == "labels" ? TokenMask::labels : TokenMask::attention;
  start.options.population = entry.at("population").get<double>();
  start.options.varianceWeight = entry.at("variance_weight").get<double>();
  start.options.biasWeight = entry.value("bias_weight", 1.0);
  start.options.gamma = entry.at("gamma").get<double>();
  start.options.damping = entry.value("damping", 1e-6);
  start.options.normalizeDelta = entry.value("normalize_delta", true);
  for (const auto& [module, facts] : entry.at("modules").items()) {
    start.modules[module] = {facts.at("relativeGap").get<double>(), facts.value("float32ProductError", 0.0),
                             facts.value("float32Angle", 0.0)};
  }
  return start;
}

ReferenceTrajectory readTrajectory(const Json& entry) {
  ReferenceTrajectory trajectory;
  trajectory.rank = entry.at("rank").get<int64_t>();
  const double alpha = entry.at("alpha").get<double>(), rank = static_cast<double>(trajectory.rank);
  trajectory.scaling = static_cast<float>(alpha / (entry.at("rslora").get<bool>() ? std::sqrt(rank) : rank));
  trajectory.weightDecay = entry.at("weightDecay").get<float>();
  for (const Json& step : entry.at("steps")) {
    trajectory.steps.push_back(
        {step.at("loss").get<double>(), step.at("gradNorm").get<double>(), step.at("learningRate").get<double>()});
  }
  return trajectory;
}

}  // namespace

ReferenceFolder::ReferenceFolder(const std::string& name)
    : path(referenceRoot() + "/" + name),
      spec(readDecoderSpec(path)),
      tensors(path + "/expected.safetensors"),
      rows(readRows(path + "/inputs.jsonl")) {
  std::ifstream file(path + "/expected.json");
  const Json expected = Json::parse(file);
  losses = expected.at("loss").get<std::vector<double>>();
  labelTokens = expected.at("labelTokens").get<std::vector<int32_t>>();
  for (const auto& [label, entry] : expected.at("loraDa").items()) starts.push_back(readStart(label, entry));
  for (const auto& [label, entry] : expected.at("trajectories").items()) trajectories[label] = readTrajectory(entry);
  for (const Json& entry : expected.at("greedy")) {
    greedy.push_back({entry.at("prompt").get<std::vector<int32_t>>(), entry.at("continuation").get<std::vector<int32_t>>()});
  }
}

TokenBatch ReferenceFolder::batch(size_t first, size_t count) const {
  TokenBatch batch;
  batch.sequenceStarts.push_back(0);
  for (size_t i = first; i < first + count; ++i) {
    const ReferenceRow& row = rows[i % rows.size()];
    batch.inputIds.insert(batch.inputIds.end(), row.inputIds.begin(), row.inputIds.end());
    batch.labels.insert(batch.labels.end(), row.labels.begin(), row.labels.end());
    batch.sequenceStarts.push_back(static_cast<int32_t>(batch.inputIds.size()));
  }
  return batch;
}

std::string referenceRoot() {
  if (const char* folder = std::getenv("LORA_DA_REFERENCE")) return folder;
  return LORA_DA_SOURCE_FOLDER "/../shared/reference";
}

bool hasReference(const std::string& name) {
  return std::ifstream(referenceRoot() + "/" + name + "/config.json").good();
}

}  // namespace lora_da::test
