{{- define "netpol-agent.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* 50 characters at most: there are names that go on. */ -}}
{{- define "netpol-agent.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride }}
{{- else if contains (include "netpol-agent.name" .) .Release.Name }}
{{- .Release.Name | replace "." "-" | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "netpol-agent.name" .) | replace "." "-" | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "netpol-agent.selector" -}}
app.kubernetes.io/name: {{ include "netpol-agent.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- /* Of everything: (dict "root" $ "component" "agent"). */ -}}
{{- define "netpol-agent.labels" -}}
app.kubernetes.io/name: {{ include "netpol-agent.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* Of the objects, not of pods: they would start anew with each version of the chart. */ -}}
{{- define "netpol-agent.objectLabels" -}}
{{ include "netpol-agent.labels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "netpol-agent.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "netpol-agent.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: say which, or let serviceAccount.create be true" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "netpol-agent.image" -}}
{{- with .Values.image }}
{{- .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- /* NAME:VERSION, of what decides whether the agent can work; `/readyz?instance=` knows two versions from each other. */ -}}
{{- define "netpol-agent.instance" -}}
{{- with .Values }}
{{- $of := list .agent .apiServer .metrics.enabled .metrics.port .npmMetrics .health .resources (include "netpol-agent.image" $) }}
{{- printf "%s/%s:%s" $.Release.Namespace $.Release.Name (toJson $of | sha256sum | trunc 10) }}
{{- end }}
{{- end }}

{{- /* Where pods on the host's network find the API server. */ -}}
{{- define "netpol-agent.apiServer" -}}
{{- with .Values.apiServer }}
{{- if ne (empty .host) (empty .port) }}
{{- fail "apiServer: host and port, both or none" }}
{{- end }}
{{- if .host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .host | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .port | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Of pods on the host's network. Their resolver is the node's: cluster DNS may be down, or be what a policy is about,
       and the only name that could be asked for is apiServer.host. */ -}}
{{- define "netpol-agent.onHostNetwork" -}}
hostNetwork: true
dnsPolicy: Default
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- /* On every node that values say, whatever is on it already. */ -}}
{{- define "netpol-agent.onEveryNode" -}}
{{ include "netpol-agent.onHostNetwork" . }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Root, since iptables and ipset want its user; but of root's rights only these two. */ -}}
{{- define "netpol-agent.writerSecurity" -}}
runAsUser: 0
runAsGroup: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: [NET_ADMIN, NET_RAW]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "netpol-agent.nobodySecurity" -}}
runAsNonRoot: true
runAsUser: 65534
runAsGroup: 65534
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* iptables-legacy's lock, which kube-proxy and the host's own tools share. No other path of the host is needed. */ -}}
{{- define "netpol-agent.xtablesMount" -}}
- name: xtables-lock
  mountPath: /run/xtables.lock
{{- end }}
{{- define "netpol-agent.xtablesVolume" -}}
- name: xtables-lock
  hostPath:
    path: /run/xtables.lock
    type: FileOrCreate
{{- end }}

{{- /* What a pod of `helm test` runs: (dict "root" $ "role" "serve"). The server tells its addresses; the environment of
       clients has the Service's. */ -}}
{{- define "netpol-agent.testPod" -}}
{{- with .root -}}
automountServiceAccountToken: false
terminationGracePeriodSeconds: 1
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
nodeSelector:
  kubernetes.io/os: linux
{{- with .Values.jobTolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: {{ $.role }}
    image: {{ include "netpol-agent.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [/usr/bin/python3, -IB, /test/reach.py, {{ $.role }}]
    env:
      {{- if eq $.role "serve" }}
      - name: ADDRESSES
        valueFrom:
          fieldRef:
            fieldPath: status.podIPs
      {{- else }}
      - name: SERVICE
        value: $({{ include "netpol-agent.fullname" . | upper | replace "-" "_" }}_TEST_SERVICE_HOST)
      {{- end }}
    {{- if eq $.role "serve" }}
    readinessProbe:
      tcpSocket: {port: 8081}
      periodSeconds: 1
    {{- end }}
    resources:
      requests: {cpu: 5m, memory: 16Mi}
      limits: {memory: 64Mi}
    securityContext: {{- include "netpol-agent.nobodySecurity" . | nindent 6 }}
    volumeMounts:
      - name: test
        mountPath: /test
        readOnly: true
volumes:
  - name: test
    configMap:
      name: {{ include "netpol-agent.fullname" . }}-test
{{- end }}
{{- end }}

{{- /* What the alerts and the dashboard know targets by: one for each node, whichever of two pods is there in an update. */ -}}
{{- define "netpol-agent.relabelings" -}}
- targetLabel: job
  replacement: netpol-agent
- sourceLabels: [__meta_kubernetes_pod_node_name]
  targetLabel: node
- sourceLabels: [__meta_kubernetes_pod_node_name]
  targetLabel: instance
- action: labeldrop
  regex: pod|container
{{- end }}
