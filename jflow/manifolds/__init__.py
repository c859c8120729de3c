"""Manifolds: spaces of directions, angles, rotations, covariances, probabilities and trees.

A `jflow.types.Manifold` is a tuple of pure functions (`exp`, `log`, `dist`, `project`, ...) over
points [..., *shape]. Paths (`paths.geodesic`), base distributions (`distributions.uniform_on`,
`wrapped_normal`), errors (`losses.riemannian_error`) and solvers (`solvers.projected`,
`solvers.geodesic_midpoint`) take one; `tangent` puts a network on it, and `check` names rows of
data that are off it. `mesh` reads triangles, on which `biharmonic` and its relatives stand in the
place of geodesics, and `mesh_bijector` makes flows of velocities.
"""

from jflow._core.names import explain_unknown
from jflow.manifolds._batch_norm import (
    LieGroup,
    frechet_mean,
    lie_batch_norm,
    log_euclidean_group,
    rotation_group,
    running_mean,
    spd_group,
)
from jflow.manifolds._check import check, tangent
from jflow.manifolds._flat import euclidean, torus
from jflow.manifolds._hyperbolic import (
    hyperboloid,
    poincare_ball,
    to_hyperboloid,
    to_poincare_ball,
)
from jflow.manifolds._matrices import (
    from_quaternion,
    so3,
    spd,
    spd_log_euclidean,
    to_quaternion,
)
from jflow.manifolds._mesh import (
    Mesh,
    biharmonic,
    commute,
    diffusion,
    laplacian,
    mesh,
    read_obj,
    surface,
)
from jflow.manifolds._product import product
from jflow.manifolds._raviart_thomas import mesh_bijector, raviart_thomas
from jflow.manifolds._sphere import (
    from_latitude_longitude,
    simplex,
    sphere,
    to_latitude_longitude,
)

__all__ = [
    "LieGroup",
    "Mesh",
    "biharmonic",
    "check",
    "commute",
    "diffusion",
    "euclidean",
    "frechet_mean",
    "from_latitude_longitude",
    "from_quaternion",
    "hyperboloid",
    "laplacian",
    "lie_batch_norm",
    "log_euclidean_group",
    "mesh",
    "mesh_bijector",
    "poincare_ball",
    "product",
    "raviart_thomas",
    "read_obj",
    "rotation_group",
    "running_mean",
    "simplex",
    "so3",
    "spd",
    "spd_group",
    "spd_log_euclidean",
    "sphere",
    "surface",
    "tangent",
    "to_hyperboloid",
    "to_latitude_longitude",
    "to_poincare_ball",
    "to_quaternion",
    "torus",
]

explain_unknown(__name__)
