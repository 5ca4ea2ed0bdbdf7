FROM python:3.14.6-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app

# Packages first: this layer is built again only when their versions change. Tests and checks stay outside.
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir --only-binary :all: -c requirements.txt \
    trio hypercorn h11 quart quart-trio werkzeug msgspec redis hiredis fakeredis lupa

# The module, and those of a fork; .dockerignore leaves out the tests.
COPY *.py ./
COPY templates templates

# nobody
USER 65534
ENV HOST=0.0.0.0 PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM

# Healthy: it answers, and it is not 503 for want of Redis.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os; from urllib.request import Request, urlopen; urlopen(Request(f\"http://127.0.0.1:{os.environ['PORT']}/jobs?limit=1\", headers={'Authorization': 'Bearer ' + os.environ.get('API_TOKEN', '')}), timeout=5)"]

CMD ["python", "jobqueue.py"]
