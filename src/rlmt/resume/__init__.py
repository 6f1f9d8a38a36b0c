"""What makes a run that was killed or stopped go on as if it had not been."""

from rlmt.resume.moment import Moment
from rlmt.resume.run_log import RunLog
from rlmt.resume.safe_files import AtomicCheckpointIO
from rlmt.resume.stopping import Stopped

__all__ = ["AtomicCheckpointIO", "Moment", "RunLog", "Stopped"]
