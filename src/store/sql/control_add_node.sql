-- Registers a node, or gives it another address, and says which its newest primary is. It is another registration,
-- for which nothing counts that was known before, unless address and server stay and the primary is no older one.
-- $1 node  $2 dsn without password  $3 system identifier  $4 timeline, both may be null
insert into shardmq_control.node as n (node, dsn, system_identifier, timeline) values ($1, $2, $3, $4)
on conflict (node) do update
   set dsn = excluded.dsn, system_identifier = excluded.system_identifier, timeline = excluded.timeline,
       registration = case
           when n.dsn = excluded.dsn and n.system_identifier is not distinct from excluded.system_identifier
                and coalesce(n.timeline, 0) <= coalesce(excluded.timeline, 0) then n.registration
           else excluded.registration end
