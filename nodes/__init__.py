"""The nodes, as one ComfyUI extension. A node is a schema and one call; only `host/` touches the host's internals."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension

from . import host

logger = logging.getLogger(__name__)

# 0.12: FLUX.2 latents and VAE, the V3 schema arguments the nodes use.
MINIMUM_HOST = (0, 12)


class ErnieExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        from .adviser import ErnieHardwareAdviser
        from .batch import ErnieBatchFromPrompts
        from .benchmark import ErnieAestheticBenchmark, ErniePromptBenchmark
        from .caching import ErnieStepCache
        from .compare import ErnieCompareImages
        from .curation import ErnieCurateExport, ErnieCurateFilter, ErnieCurateIngest, ErnieCurationReport
        from .dataset import ErnieDatasetFolder, ErnieDatasetImages, ErniePairsFolder
        from .distilling import ErnieRecipeDistil
        from .editing import (
            ErnieEditWords,
            ErnieInvertPicture,
            ErnieMixNoise,
            ErnieStyleStatistics,
            ErnieVariation,
        )
        from .evaluation import ErnieEvaluationReport, ErnieFolderDistance, ErnieJudgeByScorer
        from .experts import ErnieExpert, ErnieMixExperts
        from .grid import ErnieXYGrid
        from .guidance import ErnieGuidance, ErnieNegativeForTurbo, ErnieSeedVariety, ErnieSkipLayerGuidance
        from .inpainting import ErnieHardInpaint, ErnieInpaintPrepare, ErnieInpaintStitch
        from .judging import ErnieJudgeByPeople
        from .labelling import (
            ErnieCurateCaptions,
            ErnieCurateCaptionStyles,
            ErnieCurateCategories,
            ErnieCurateScores,
            ErnieLoadCaptioner,
            ErnieServerCaptioner,
        )
        from .layout import ErnieLayoutPrompt
        from .loading import (
            ErnieLoadDiffusionModel,
            ErnieLoadImageModel,
            ErnieLoadPromptEnhancer,
            ErnieLoadTextEncoder,
            ErnieLoadVAE,
        )
        from .lora import ErnieConvertLora, ErnieExtractLora, ErnieLoadLora, ErnieMergeLora, ErnieResizeLora
        from .mixing import ErnieSamplingPlan
        from .prompt_sets import ErniePromptSet
        from .recipes import ErnieRecipe, ErnieRecipeDPO, ErnieTrainingModels
        from .regions import ErnieRegionalPrompt
        from .sampling import ErnieEmptyLatent, ErnieSampler, ErnieSamplerSelect, ErnieSigmas
        from .scoring import (
            ErnieBestOfN,
            ErnieFilterByScore,
            ErnieLoadScorer,
            ErnieScoreImages,
            ErnieScoreReport,
        )
        from .teachers import ErnieTeacherTable
        from .text import ErnieEncodePrompt, ErnieEnhancePrompt, ErnieServerEnhancer
        from .tournament import ErniePairsFromScores, ErnieTournament
        from .training import ErniePreflight, ErnieReducedDepth, ErnieTrain, ErnieTrainingReport
        from .upscaling import ErnieTiledSampling, ErnieUpscaleLatent
        from .wildcards import ErnieWildcards
        from .win_rate import ErnieChoosePairs, ErnieWinRate

        return [
            ErnieLoadImageModel,
            ErnieLoadDiffusionModel,
            ErnieLoadTextEncoder,
            ErnieLoadPromptEnhancer,
            ErnieLoadVAE,
            ErnieEncodePrompt,
            ErnieEnhancePrompt,
            ErnieServerEnhancer,
            ErnieWildcards,
            ErnieLayoutPrompt,
            ErnieEmptyLatent,
            ErnieSampler,
            ErnieSamplerSelect,
            ErnieSigmas,
            ErnieInpaintPrepare,
            ErnieInpaintStitch,
            ErnieHardInpaint,
            ErnieRegionalPrompt,
            ErnieEditWords,
            ErnieVariation,
            ErnieInvertPicture,
            ErnieMixNoise,
            ErnieStyleStatistics,
            ErnieUpscaleLatent,
            ErnieTiledSampling,
            ErnieGuidance,
            ErnieSkipLayerGuidance,
            ErnieNegativeForTurbo,
            ErnieSeedVariety,
            ErnieBatchFromPrompts,
            ErnieXYGrid,
            ErnieCompareImages,
            ErnieLoadLora,
            ErnieMergeLora,
            ErnieExtractLora,
            ErnieResizeLora,
            ErnieConvertLora,
            ErnieExpert,
            ErnieMixExperts,
            ErnieDatasetFolder,
            ErnieDatasetImages,
            ErniePairsFolder,
            ErnieTrainingModels,
            ErnieLoadCaptioner,
            ErnieServerCaptioner,
            ErnieCurateCategories,
            ErnieCurateCaptions,
            ErnieCurateCaptionStyles,
            ErnieCurateScores,
            ErnieSamplingPlan,
            ErnieRecipe,
            ErnieRecipeDPO,
            ErnieRecipeDistil,
            ErnieTeacherTable,
            ErniePreflight,
            ErnieTrain,
            ErnieTrainingReport,
            ErnieReducedDepth,
            ErnieStepCache,
            ErnieLoadScorer,
            ErnieScoreImages,
            ErnieFilterByScore,
            ErnieBestOfN,
            ErnieScoreReport,
            ErnieTournament,
            ErniePairsFromScores,
            ErnieChoosePairs,
            ErnieWinRate,
            ErnieAestheticBenchmark,
            ErniePromptBenchmark,
            ErnieCurateIngest,
            ErnieCurateFilter,
            ErnieCurationReport,
            ErnieCurateExport,
            ErniePromptSet,
            ErnieJudgeByPeople,
            ErnieJudgeByScorer,
            ErnieEvaluationReport,
            ErnieFolderDistance,
            ErnieHardwareAdviser,
        ]


class NoNodes(ComfyExtension):
    """What a host that is too old gets."""

    async def get_node_list(self) -> list[type]:
        return []


def make_extension() -> ComfyExtension:
    """All nodes, or none and one line in the log on a ComfyUI older than `MINIMUM_HOST`."""
    version = host.host_version()
    if version is not None and version < MINIMUM_HOST:
        needed, found = (".".join(map(str, v)) for v in (MINIMUM_HOST, version))
        logger.warning(
            "The ERNIE-Image nodes need ComfyUI %s or newer and this is %s: none was added. "
            "Update ComfyUI to use them.",
            needed,
            found,
        )
        return NoNodes()
    from . import judging, panel_routes, tournament
    from .picture_notes import note_queued_run

    panel_routes.serve(tournament.ROUTES | judging.ROUTES)
    host.watch_queue(note_queued_run)
    return ErnieExtension()
