# A frozen image for a classroom: the lock, llama-cpp-python compiled for any processor of the last ten years, JupyterLab
# for a user without rights. Read by tests/test_dockerfile.py, its last RUN tried in a bare environment; it has not been built.
#
#   docker build -t workbook .
#   docker run --rm -p 127.0.0.1:8888:8888 -v "$PWD/work:/home/student/work" workbook
#
# A mirror: docker build --build-arg PIP_INDEX_URL=https://your-mirror/simple -t workbook .

FROM python:3.12.11-slim-bookworm AS built

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# Not pinned: Debian's packages have the versions of their release, and a pinned one disappears with the next fix
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/workbook
COPY requirements.txt ./
# GGML_NATIVE=OFF: the machine that builds the image is not the one that runs it. Without the code for AMX: scripts/setup.sh
RUN CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
    CFLAGS=-U__AMX_INT8__ CXXFLAGS=-U__AMX_INT8__ \
    pip install --no-cache-dir --requirement requirements.txt

FROM python:3.12.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fonts-noto-cjk git libgomp1 make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 student
COPY --from=built /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv PYTHONUTF8=1 \
    HF_HOME=/home/student/work/huggingface WORKBOOK_HOME=/home/student/work
WORKDIR /home/student/workbook
COPY --chown=student:student pyproject.toml requirements.txt README.md README.zh-CN.md LICENSE Makefile ./
COPY --chown=student:student lib ./lib
COPY --chown=student:student notebooks ./notebooks
COPY --chown=student:student params ./params
COPY --chown=student:student scripts ./scripts
COPY --chown=student:student docs ./docs
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && mkdir -p /home/student/work \
    && chown -R student:student /home/student
USER student
EXPOSE 8888
# JupyterLab prints its address with a token; give only that to the student who sits there
CMD ["jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser", "notebooks"]
