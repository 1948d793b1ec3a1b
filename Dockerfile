FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fastapi_chatdify_db ./fastapi_chatdify_db
COPY celery_ext ./celery_ext
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir '.[production]'

FROM python:3.13-slim
RUN useradd --system --create-home --uid 10001 chatdify
COPY --from=build /venv /venv
WORKDIR /app
COPY example_app ./example_app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8000
CMD ["uvicorn", "--factory", "example_app.main:create_app", "--host", "0.0.0.0", "--no-access-log"]
