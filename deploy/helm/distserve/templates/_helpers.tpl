{{- define "distserve.labels" -}}
app.kubernetes.io/name: distserve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "distserve.metadata" -}}
labels:
  {{- include "distserve.labels" . | nindent 2 }}
annotations:
  prometheus.io/scrape: "true"
  prometheus.io/port: "8002"
{{- end }}

{{- define "distserve.claim" -}}
{{ .Values.models.existingClaim | default (printf "%s-models" .Release.Name) }}
{{- end }}

{{- define "distserve.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpus }}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" .Values.gpus) ($resources.limits | default dict)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- /* What every pod of a server has: of a Deployment, and of both kinds of a LeaderWorkerSet. */}}
{{- define "distserve.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
# On SIGTERM the server drains; what is left after that gets an error, and a second for it.
terminationGracePeriodSeconds: {{ add .Values.preStopSeconds .Values.drainTimeoutSeconds 15 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: models
    persistentVolumeClaim: { claimName: {{ include "distserve.claim" . }} }
  - name: shm
    emptyDir: { medium: Memory, sizeLimit: {{ .Values.shmSize }} }
  - name: tmp
    emptyDir: {}
{{- end }}

{{- define "distserve.container" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
resources:
  {{- include "distserve.resources" . | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
volumeMounts:
  - { name: models, mountPath: /models }
  - { name: shm, mountPath: /dev/shm }
  - { name: tmp, mountPath: /tmp }
{{- end }}

{{- define "distserve.env" -}}
- { name: HOME, value: /models/.home }
{{- if .Values.huggingFaceSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: { name: {{ .Values.huggingFaceSecret }}, key: token }
{{- end }}
{{- if .Values.apiKeySecret }}
- name: DISTSERVE_API_KEY
  valueFrom:
    secretKeyRef: { name: {{ .Values.apiKeySecret }}, key: key }
{{- end }}
{{- end }}

{{- define "distserve.args" -}}
- --model={{ .Values.model }}
{{- with .Values.prefillDevices }}
- --prefill-devices={{ . }}
{{- end }}
{{- with .Values.decodeDevices }}
- --decode-devices={{ . }}
{{- end }}
- --drain-timeout={{ .Values.drainTimeoutSeconds }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{- define "distserve.server" -}}
ports:
  - { name: http, containerPort: 8000 }
  - { name: grpc, containerPort: 8001 }
  - { name: metrics, containerPort: 8002 }
  - { name: openai, containerPort: 9000 }
# Ready: requests can be served. Alive: also while a Triton server that has ended is started again.
startupProbe:
  httpGet: { path: /v2/health/ready, port: http }
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div .Values.startupTimeoutSeconds 5 }}
readinessProbe:
  httpGet: { path: /v2/health/ready, port: http }
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: { path: /v2/health/live, port: http }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
lifecycle:
  preStop:
    exec: { command: [sleep, {{ .Values.preStopSeconds | quote }}] }
{{- end }}
