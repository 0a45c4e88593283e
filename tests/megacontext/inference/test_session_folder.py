"""The folder of a session: what it says comes back as it was."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from tests.megacontext.inference.test_session import HISTORY, OFTEN

from megacontext import MCController, SessionConfig


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            dataclasses.replace(OFTEN, expand_threshold=-math.inf),
            dataclasses.replace(OFTEN, expand_threshold=math.inf, collapse_threshold=-math.inf),
            dataclasses.replace(OFTEN, margin=math.inf),
            dataclasses.replace(OFTEN, max_edits=np.int64(7), detail_share=np.float64(0.25)),
        ],
    )
    def test_whatever_begins_a_session_resumes_it(
        self, mc: MCController, tmp_path: Path, settings: SessionConfig
    ) -> None:
        """An infinite threshold, which is legal, was written as null, and the session was lost."""
        mc.begin_inference_session(
            HISTORY[:40], tree_store="disk", path=tmp_path / "s", settings=settings
        )
        mc.end_inference_session()
        mc.resume_inference_session(tmp_path / "s")
        assert mc._session is not None
        assert mc._session.settings == settings
