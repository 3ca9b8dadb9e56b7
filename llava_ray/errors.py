"""Everything that this package raises on purpose.

    LlavaRayError                     the caller sees its message; 500 unless a class says otherwise
    ├── UserError                     the caller can fix it; 400
    │   ├── ConfigError               a configuration that cannot be run
    │   ├── RequestError              a field of a request, named by `param`
    │   │   ├── ImageError            an image that cannot be used
    │   │   │   ├── ImageTooLargeError    more bytes or pixels than the limits allow
    │   │   │   ├── ImageUrlError         an address from which no image is fetched
    │   │   │   └── FetchError        an address that gave no usable image; 422
    │   │   ├── ContextLengthError    more tokens than the model's context holds
    │   │   ├── UnsupportedError      a known field with a value that is not supported here
    │   │   ├── RequestTooLargeError  a body over the limit; 413
    │   │   ├── EncodingError         a body compressed in a way that is not read here; 415
    │   │   └── RefusedError          a question that the moderation service objects to
    │   ├── SampleError               a sample that cannot be used for training; names its id
    │   ├── ModelNotFoundError        no such model here; 404
    │   ├── NotAllowedError           the configuration does not allow it; 403
    │   ├── AuthError                 no API key, or one that is not known; 401
    │   ├── DiskFullError             there is no space for a file
    │   ├── SupersededError           a request with the same Idempotency-Key took its place; 409
    │   └── MissingPackageError       an optional package is not installed
    ├── OverloadedError               all replicas are busy, try again; 503
    │   └── RateLimitError            an API key has used up its budget for now; 429
    ├── DeadlineError                 a request took longer than allowed; 504
    ├── UnreachableError              a server behind this one does not answer; 502
    ├── TrainingError                 a training run that cannot go on as it is
    │   ├── DivergedError             its loss is no number any more; trying again would not help
    │   └── StoppedError              Ctrl-C or SIGTERM ended it after a checkpoint
    └── EngineError                   the engine broke; the replica will be replaced; 500

A message says what is wrong, the value seen and what to do. Every class takes that message as its
one positional argument, so that an instance survives pickling on its way between processes.
`status` and `code` are those of the OpenAI API's error bodies (see `serve/openai/chat.py`).
"""


class LlavaRayError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        status: the HTTP status with which the gateway answers.
        code: the machine-readable code in the body of that answer.
        param: the field of the request that is at fault, where there is one.
        retry_after_s: seconds after which a retry may succeed, where that is known.
    """

    status: int = 500
    code: str = "internal_error"
    retry_after_s: float | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def message(self) -> str:
        return str(self.args[0])


class UserError(LlavaRayError):
    """An error that the caller can fix."""

    status = 400
    code = "invalid_request"


class ConfigError(UserError):
    """A configuration that cannot be run."""

    code = "invalid_config"


class RequestError(UserError):
    """A request that cannot be served as it is."""


class ImageError(RequestError):
    """An image that cannot be fetched, decoded or accepted."""

    code = "invalid_image"


class ImageTooLargeError(ImageError):
    """An image with more bytes or pixels than the limits allow."""


class ImageUrlError(ImageError):
    """A URL from which this server fetches no images."""

    code = "image_url_refused"


class FetchError(ImageError):
    """The URL of an image could not be fetched, or what it returned is not an image."""

    status = 422
    code = "image_fetch_failed"


class ContextLengthError(RequestError):
    """More tokens than fit into the model's context or into its engine's cache."""

    code = "context_length_exceeded"


class UnsupportedError(RequestError):
    """A known field asks for something that this server cannot do."""

    code = "unsupported_parameter"


class RequestTooLargeError(RequestError):
    """The body of a request is over the limit."""

    status = 413
    code = "request_too_large"


class EncodingError(RequestError):
    """The body of a request is compressed in a way that this server does not read."""

    status = 415
    code = "unsupported_encoding"


class RefusedError(RequestError):
    """The moderation service objects to a question."""

    code = "content_policy_violation"


class SampleError(UserError):
    """A sample that cannot be used for training.

    Attributes:
        reason: a word by which such samples are counted ("roles", "image_missing").
    """

    code = "invalid_sample"

    def __init__(self, message: str, *, param: str | None = None, reason: str = "unusable") -> None:
        super().__init__(message, param=param)
        self.reason = reason


class ModelNotFoundError(UserError):
    """No model of that name is served here."""

    status = 404
    code = "model_not_found"


class NotAllowedError(UserError):
    """The configuration of the server does not allow it."""

    status = 403
    code = "not_allowed"


class AuthError(UserError):
    """The request has no API key, or one that is not known here."""

    status = 401
    code = "invalid_api_key"


class SupersededError(UserError):
    """Another request with the same Idempotency-Key took the place of this one."""

    status = 409
    code = "superseded"


class DiskFullError(UserError):
    """There is no space for a file that is to be written."""

    code = "disk_full"


class MissingPackageError(UserError):
    """An optional package is not installed."""

    code = "missing_package"


class OverloadedError(LlavaRayError):
    """All replicas are busy and their queues are full."""

    status = 503
    code = "overloaded"


class UnreachableError(LlavaRayError):
    """A server to which this one forwards the request does not answer."""

    status = 502
    code = "unreachable"


class RateLimitError(OverloadedError):
    """An API key has used up its budget for now."""

    status = 429
    code = "rate_limit_exceeded"


class DeadlineError(LlavaRayError):
    """A request took longer than allowed and was stopped."""

    status = 504
    code = "deadline_exceeded"


class TrainingError(LlavaRayError):
    """A training run that cannot go on: its loss is not finite, or memory ran out."""

    code = "training_error"


class DivergedError(TrainingError):
    """A training run whose loss is not finite; every worker raises it at the same step."""


class StoppedError(TrainingError):
    """A training run that was asked to stop and has saved a checkpoint."""


class EngineError(LlavaRayError):
    """The engine of a replica does not work any more."""

    code = "engine_error"
