//! The mesh model: joins what the API server says into workloads and services, and answers who is in the mesh.
